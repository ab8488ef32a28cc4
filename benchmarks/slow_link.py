"""Step time over a link of 1 Gbit/s: two hosts, on each a trainer and a partition, over DDP on the same hosts.

    python benchmarks/slow_link.py [--rounds 3] [--steps 24] [--only ours_fp32 ddp_fp32 ...]

The hosts are namespaces of this machine on one bridge (tests/harness/hosts.py), and `tc` slows each link down in both
directions; the lan_* sides run over the same links at full speed. That needs root, ip, tc, unshare, nsenter and mount;
where they are missing the script prints it and exits 0. The model is the 12 M-parameter GPT, 64 tokens, 4 a microbatch,
one thread a process. Ours is a job of 2 trainers x 2 partitions with `transport: auto`: shared memory within a host,
TCP across. DDP has one rank a host, over gloo; it runs with defaults, with our trainers' malloc settings (`*_malloc`),
and with these and buckets of 5 MB (`*_tuned`); the best of them counts. Needs an otherwise idle machine and takes about
a quarter of an hour.

    gbit_fp32_speedup      seconds a step: DDP / ours, both fp32
    gbit_bf16_speedup      seconds a step: DDP in fp32 / ours with push_codec and pull_codec bf16
    gbit_ddp_bf16_speedup  seconds a step: DDP in fp32 / DDP with its bf16 compress hook
    tls_step_over_plain    seconds a step: ours in fp32 with TLS between the hosts / without certificates (<= 1.10)
    lan_step_over_ddp      seconds a step at full speed: ours in fp32 without certificates / DDP in fp32 (<= 0.95)
    lan_tls_step_over_ddp  the same with TLS between the hosts, which DDP does not have

Also recorded: megabytes (1e6) that one host sends over the link in a step, the mean of all steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from _baseline import Loop, baseline, ddp_sides, variants
from _jobs import SKIP, spec
from _marks import median_step_s
from _measure import Key, Side, options, run
from _static import Place, Starter, fill, started, train
from harness.hosts import INTERFACE, HostNetwork, missing
from harness.static_job import StaticJob

NAME = "slow_link"
LINK_RATE = "1gbit"
DDP_FP32, DDP_BF16, LAN_DDP = variants("ddp_fp32"), variants("ddp_bf16"), variants("lan_ddp")
KEYS = {
    "gbit_fp32_speedup": Key(what="step_s", of=DDP_FP32, over=("ours_fp32",)),
    "gbit_bf16_speedup": Key(what="step_s", of=DDP_FP32, over=("ours_bf16",)),
    "gbit_ddp_bf16_speedup": Key(what="step_s", of=DDP_FP32, over=DDP_BF16),
    "tls_step_over_plain": Key(what="step_s", of=("ours_tls",), over=("ours_fp32",)),
    "lan_step_over_ddp": Key(what="step_s", of=("lan_ours",), over=LAN_DDP),
    "lan_tls_step_over_ddp": Key(what="step_s", of=("lan_ours_tls",), over=LAN_DDP),
}


def ours(steps: int, codec: str, data_security: str = "", rate: str | None = LINK_RATE) -> dict[str, float]:
    """2 trainers x 2 partitions, one of each a host; `data_security`: as in ProcessSpec; `rate`: of a host's link."""
    job_spec = spec(workers=2, partitions=2, steps=steps, transport="auto", codec=codec)
    with HostNetwork(2, rate=rate) as network:
        first, addresses = network.hosts[0], [host.address for host in network.hosts]
        places = [Place(prefix=host.enter, environment={"PS_SOCKET_DIR": str(host.tmp)}) for host in network.hosts]
        starter = Starter(places=places)
        with started(job_spec, starter, data_hosts=addresses, data_security=data_security) as (job, _):
            fill(job)
            before = first.sent_bytes()
            times = train(job, SKIP)
            sent = first.sent_bytes() - before
            check_transports(job)
    step_s = median_step_s(times)
    return {"step_s": step_s, "link_mb_per_step": sent / steps / 1e6}


def check_transports(job: StaticJob) -> None:
    """Fail unless each trainer reached its own host's partition without TCP, and the other one over TCP."""
    for rank in range(2):
        held = {c.partition: c.transport for c in job.reported(f"trainer-{rank}", "connected")[-1].connections}
        assert held[1 - rank] == "tcp" and held[rank] in ("unix", "shm"), f"trainer {rank} is connected by {held}"


def ddp(rate: str | None, loop: Loop, environment: Mapping[str, str]) -> dict[str, float]:
    """One rank of DDP a host."""
    with HostNetwork(2, rate=rate) as network:
        prefixes = [host.enter for host in network.hosts]
        found = baseline(loop, environment, prefixes=prefixes, interface=INTERFACE)
        return {"step_s": found["step_s"], "link_mb_per_step": network.hosts[0].sent_bytes() / loop.steps / 1e6}


def sides(steps: int) -> dict[str, Side]:
    """Everything that is measured, in the order of a round."""
    return {
        **ddp_sides("ddp_fp32", Loop(world=2, steps=steps), partial(ddp, LINK_RATE)),
        "ours_fp32": partial(ours, steps, "fp32"),
        "ours_tls": partial(ours, steps, "fp32", "tls"),
        **ddp_sides("ddp_bf16", Loop(world=2, steps=steps, bf16=True), partial(ddp, LINK_RATE)),
        "ours_bf16": partial(ours, steps, "bf16"),
        **ddp_sides("lan_ddp", Loop(world=2, steps=steps), partial(ddp, None)),
        "lan_ours": partial(ours, steps, "fp32", rate=None),
        "lan_ours_tls": partial(ours, steps, "fp32", "tls", rate=None),
    }


def main() -> None:
    chosen = options(__doc__ or "", rounds=3, steps=24).parse_args()
    reason = missing()
    if reason:
        print(f"{NAME}: skipped: {reason}")
        return
    note = (
        "12 M-parameter GPT, sequence 64, microbatch 4, one thread a process, two hosts joined by "
        f"{LINK_RATE}, or (lan) by links as fast as the machine"
    )
    run(NAME, sides(max(chosen.steps, SKIP + 2)), KEYS, note, chosen)


if __name__ == "__main__":
    main()
