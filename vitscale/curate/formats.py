"""The formats that packing reads, by name. Nothing here takes long to import."""

from vitscale.vtab.tasks import TASKS

TRANSFER_FORMATS = ("pets", "flowers102", "imagenet_real", "imagenet_v2", "objectnet")
PLAIN_FORMATS = (
    *("imagefolder", "imagenet21k", "imagenet1k", "cifar10", "cifar100"),
    *TRANSFER_FORMATS,
    *("csv", "jsonl", "shards"),
)
VTAB_FORMATS = tuple(f"vtab/{name}" for name in TASKS)
FORMAT_NAMES = (*PLAIN_FORMATS, *VTAB_FORMATS)
