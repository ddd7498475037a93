"""How sizes and counts are written for people."""

from tqdm import tqdm


def size_text(num_bytes: int | float) -> str:
    """For example "1.04 GB" or "512 kB", in powers of 1,000."""
    text = tqdm.format_sizeof(num_bytes)
    number = text.rstrip("kMGTPEZY")
    return f"{number} {text[len(number) :]}B"


def counted(count: int, noun: str) -> str:
    """For example "1 file" or "1,024 files"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
