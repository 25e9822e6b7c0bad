"""Nodes of a Ray cluster, all on this machine: commands that run in the foreground until they are ended."""

from tests.s3 import free_ports

_PORTS = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port")


def head_command(gcs: int, *, cpus: float, dashboard: int | None = None) -> list[str]:
    """A head on port `gcs`, with a job server on port `dashboard`."""
    client, *_ = free_ports(1)
    shown = ["--include-dashboard=false"] if dashboard is None else [f"--dashboard-port={dashboard}"]
    return [*_start(cpus), "--head", f"--port={gcs}", f"--ray-client-server-port={client}", *shown]


def node_command(gcs: int, *, cpus: float) -> list[str]:
    """A node that joins the head on port `gcs`."""
    return [*_start(cpus), f"--address=127.0.0.1:{gcs}"]


def _start(cpus: float) -> list[str]:
    command = ["ray", "start", "--block", f"--num-cpus={cpus:g}", "--node-ip-address=127.0.0.1"]
    command += ["--object-store-memory=200000000", "--disable-usage-stats"]
    return command + [f"--{name}={port}" for name, port in zip(_PORTS, free_ports(len(_PORTS)), strict=True)]
