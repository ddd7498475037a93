"""The formats that packing reads, by name. Nothing here takes long to import."""

from vitscale.vtab.tasks import TASKS

PLAIN_FORMATS = ("imagefolder", "imagenet21k", "imagenet1k", "cifar10", "cifar100", "csv", "jsonl", "shards")
VTAB_FORMATS = tuple(f"vtab/{name}" for name in TASKS)
FORMAT_NAMES = (*PLAIN_FORMATS, *VTAB_FORMATS)
