"""Which variables of the environment ranks on other hosts need, and how they get there.

deepspeed passes on little more than PYTHON*. The rest it reads from a file, a variable a line,
and puts into the command line that pdsh gives to a shell on each host.
"""

import re
from collections.abc import Mapping

# Prefixes name a library's variables, names a single one.
PREFIXES = (
    "AWS_", "GOOGLE_", "GCS_", "GCLOUD_", "HF_", "FSSPEC_", "VITSCALE_", "DS_", "TORCH_", "TORCHINDUCTOR_",
    "GLOO_", "NCCL_", "TP_", "CUDA_", "OMP_", "MKL_", "UCX_", "FI_", "LD_", "SSL_", "REQUESTS_",
)  # fmt: skip
NAMES = (
    "BOTO_CONFIG", "CLOUDSDK_CONFIG", "CURL_CA_BUNDLE", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "TMPDIR",
    "TRITON_CACHE_DIR", "PYTHONWARNINGS", "http_proxy", "https_proxy", "no_proxy",
)  # fmt: skip
# Of this host alone: which devices it shows, and how it was started itself.
NOT = ("CUDA_VISIBLE_DEVICES", "DS_ENV_FILE")
_SAFE = re.compile(r"[\w@%+=:,./-]*")  # what deepspeed does not put between double quotes


def forwarded(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that ranks need, wherever they run."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if (name.startswith(PREFIXES) or name in NAMES) and name not in NOT
    }


def for_deepspeed(variables: Mapping[str, str]) -> str:
    """The content of a .deepspeed_env file.

    An empty line would be an error, and a value ends with its line. deepspeed puts values with
    unusual characters between double quotes, in which a shell still reads some.
    """
    return "".join(f"{name}={_value(value)}\n" for name, value in variables.items() if "\n" not in value)


def for_pdsh(argument: str) -> str:
    """An argument of a program, so that it survives pdsh and the shell on the other host."""
    argument = argument.replace("%", "%%")
    if " " in argument:  # deepspeed puts it between double quotes, and escapes those in it
        return re.sub(r"[\\$`]", r"\\\g<0>", argument)
    return argument if _SAFE.fullmatch(argument) else "'" + argument.replace("'", "'\\''") + "'"


def _value(value: str) -> str:
    escaped = value if _SAFE.fullmatch(value) else re.sub(r'[\\$`"]', r"\\\g<0>", value)
    return escaped.replace("%", "%%")
