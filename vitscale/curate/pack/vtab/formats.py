"""The converters of VTAB-1k's 19 tasks by the name of their format."""

import functools
from collections.abc import Callable, Mapping

from vitscale.curate.pack.config import PackConfig
from vitscale.curate.pack.listing import Listing
from vitscale.curate.pack.vtab import arrays, clevr, dmlab, folders, kitti, lists, retinopathy, sun397

VTAB_FORMATS: Mapping[str, Callable[[str, PackConfig], Listing]] = {
    "vtab/caltech101": folders.list_caltech101,
    "vtab/cifar100": arrays.list_cifar100,
    "vtab/dtd": lists.list_dtd,
    "vtab/flowers102": lists.list_flowers102,
    "vtab/pets": lists.list_pets,
    "vtab/sun397": sun397.list_sun397,
    "vtab/svhn": arrays.list_svhn,
    "vtab/patch_camelyon": arrays.list_patch_camelyon,
    "vtab/eurosat": folders.list_eurosat,
    "vtab/resisc45": folders.list_resisc45,
    "vtab/retinopathy": retinopathy.list_retinopathy,
    "vtab/clevr_count": functools.partial(clevr.list_clevr, task="clevr_count"),
    "vtab/clevr_distance": functools.partial(clevr.list_clevr, task="clevr_distance"),
    "vtab/dmlab": dmlab.list_dmlab,
    "vtab/dsprites_location": functools.partial(arrays.list_dsprites, task="dsprites_location"),
    "vtab/dsprites_orientation": functools.partial(arrays.list_dsprites, task="dsprites_orientation"),
    "vtab/kitti_distance": kitti.list_kitti_distance,
    "vtab/smallnorb_azimuth": functools.partial(arrays.list_smallnorb, task="smallnorb_azimuth"),
    "vtab/smallnorb_elevation": functools.partial(arrays.list_smallnorb, task="smallnorb_elevation"),
}
