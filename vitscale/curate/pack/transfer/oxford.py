"""Oxford-IIIT Pet and Oxford Flowers-102 whole, as the paper transfers to them (section 4.1).

Both train on all that is not the test set; a part of it is held out for the choice of the
learning rate by `[finetune] dev_fraction`.
"""

from vitscale.curate.pack.config import PackConfig
from vitscale.curate.pack.listing import Listing
from vitscale.curate.pack.transfer.whole import TransferSet, make_listing
from vitscale.curate.pack.vtab.examples import all_references
from vitscale.curate.pack.vtab.lists import read_flowers102, read_pets

PETS = TransferSet(name="pets", num_classes=37, sizes={"train": 3680, "test": 3669})
FLOWERS = TransferSet(name="flowers102", num_classes=102, sizes={"train": 2040, "test": 6149})


def list_pets(source: str, config: PackConfig) -> Listing:
    """A folder with images.tar.gz and annotations.tar.gz; train is the list trainval.txt."""
    splits, classes = read_pets(source, PETS.name)
    rows = {split: all_references(examples) for split, examples in splits.items()}
    names = {len(classes)} - {0, PETS.num_classes}
    deviations = [f"there are {number} classes instead of {PETS.num_classes}" for number in names]
    return make_listing(PETS, source, rows, classes, deviations=deviations)


def list_flowers102(source: str, config: PackConfig) -> Listing:
    """A folder with 102flowers.tgz, imagelabels.mat and setid.mat; train is trnid and valid."""
    splits = read_flowers102(source, FLOWERS.name)
    rows = {
        "train": [*all_references(splits["train"]), *all_references(splits["validation"])],
        "test": all_references(splits["test"]),
    }
    return make_listing(FLOWERS, source, rows)
