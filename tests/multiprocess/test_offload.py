"""The optimizer's moments in files of a disk: the same numbers, and nothing is left behind."""

import json
from pathlib import Path

import pytest
import torch
from multiprocess.job import Job
from multiprocess.rank_runs import train_and_note_files
from multiprocess.ranks import KillAll
from multiprocess.zygote import Zygote

from vitscale.engine.mapped import mapped_zeros
from vitscale.errors import StoreError

PAGE = 4096
LAYOUTS = [(1, "bf16"), (3, "bf16"), (2, "fp32"), (1, "fp32"), (2, "bf16"), (3, "fp32")]


@pytest.mark.parametrize(("stage", "precision"), LAYOUTS)
def test_moments_on_a_disk_change_no_bit(
    tmp_path: Path, index: Path, zygote: Zygote, stage: int, precision: str, sweep: bool
) -> None:
    if not sweep and (stage, precision) not in LAYOUTS[:2]:
        pytest.skip("with --sweep: two layouts are tried always")
    whole, job = Job(tmp_path / "whole", index), Job(tmp_path / "job", index)
    folder = tmp_path / "nvme"
    folder.mkdir()
    options = [f"precision={precision}", f"engine.zero_stage={stage}", "engine.offload_optimizer=true"]
    assert zygote.train(whole, 2, *options) == [0, 0], whole.output()
    options.append(f"engine.offload_folder={folder}")
    assert zygote.train(job, 2, *options, event=KillAll(batch=9)) == [-9, -9], job.output()
    assert not list(folder.iterdir())  # even now
    out = tmp_path / "mapped"
    arguments = (job.config, options, folder, out)
    assert zygote.run(2, train_and_note_files, *arguments, log=job.log) == [0, 0], job.output()
    for name in ("train/loss", "train/grad_norm"):
        assert job.column(name) == whole.column(name)
    # Two moments of what each rank owns, in whole pages.
    for rank in (0, 1):
        sizes = json.loads(out.with_suffix(f".{rank}").read_text())
        assert len(sizes) % 2 == 0 and sum(sizes) >= 2 * PAGE, sizes
    assert not list(folder.iterdir())


def test_they_can_be_moved_to_a_disk_and_back_with_other_optimizers(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    whole, job = Job(tmp_path / "whole", index), Job(tmp_path / "job", index)
    sgd = ("optim.name=sgd", "optim.weight_decay=0", "optim.lr=0.02", "engine.offload_optimizer=true")
    assert zygote.train(whole, 1, *sgd) == [0], whole.output()
    assert zygote.train(job, 1, *sgd, event=KillAll(batch=5)) == [-9], job.output()
    disk = f"engine.offload_folder={tmp_path}"
    assert zygote.train(job, 1, *sgd, disk, event=KillAll(batch=5)) == [-9], job.output()
    assert zygote.train(job, 1, *sgd) == [0], job.output()
    assert job.column("train/loss") == whole.column("train/loss")


def test_a_mapped_tensor_is_in_a_file_without_a_name(tmp_path: Path) -> None:
    tensor = mapped_zeros(3 * PAGE, str(tmp_path))
    assert tensor.dtype == torch.float32 and not tensor.any() and not list(tmp_path.iterdir())
    tensor += 1
    assert tensor.sum() == 3 * PAGE
    assert f"{tmp_path}/" in Path("/proc/self/maps").read_text()
    assert len(mapped_zeros(0, str(tmp_path))) == 0


@pytest.mark.parametrize("folder", ["missing", "."])
def test_a_disk_that_cannot_hold_them_is_told_at_the_start(
    tmp_path: Path, index: Path, zygote: Zygote, folder: str
) -> None:
    place = tmp_path / folder
    if place.exists():  # more than any disk has
        with pytest.raises(StoreError, match="of the optimizer's moments cannot be written"):
            mapped_zeros(2**52, str(place))
        return
    job = Job(tmp_path / "job", index)
    options = ("engine.offload_optimizer=true", f"engine.offload_folder={place}")
    assert zygote.train(job, 2, *options) == [2, 2], job.output()
    assert job.output().count("error: ") == 1, job.output()
    assert f"engine.offload_folder {place}: " in job.output() and "No such file" in job.output()
