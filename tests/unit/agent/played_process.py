"""What the agents under test run in place of a trainer: plays the mode that its spec names."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pscluster.agent.link import HeartbeatThread, ProcessLink
from pscluster.v1 import plan_pb2 as plan


def serve(link: ProcessLink) -> None:
    """Tell what it sees, adopt every plan, end when told."""
    seen = {
        "cwd": os.getcwd(),
        "path": sys.path[0],
        "sockets": os.environ["PS_SOCKET_DIR"],
        "threads": os.environ["OMP_NUM_THREADS"],
        "token": os.environ.get("PS_TOKEN_FILE", ""),
    }
    print(f"serving {json.dumps(seen)}")
    link.report(plan.ProcessReport(trainer_ready=plan.TrainerReady(device=link.start.device, layout_json=b"{}")))
    adopt(link, link.start.plan)
    while (order := link.receive()) is not None and not order.HasField("shutdown"):
        adopt(link, order.plan)
        if order.HasField("credentials"):
            show(link, order.credentials)


def show(link: ProcessLink, credentials: plan.Credentials) -> None:
    """Report which certificate it has, and whether its key is where user code finds it."""
    found = any(credentials.key_pem in value for value in map(str.encode, os.environ.values()))
    with open("/proc/self/cmdline", "rb") as file:
        found = found or credentials.key_pem in file.read()
    digest = hashlib.sha256(credentials.key_pem + credentials.certificate_pem).hexdigest()
    link.report(plan.ProcessReport(evaluated=plan.Evaluated(step=int(found), metrics={digest: 0.0})))


def listening(link: ProcessLink) -> None:
    """Report, as a partition does, where it was told to listen, and its certificate."""
    start = link.start
    ports = f"{start.data_port_first}-{start.data_port_last}"
    link.report(plan.ProcessReport(partition_ready=plan.PartitionReady(addresses=[start.data_host, ports])))
    show(link, start.credentials)
    serve(link)


def adopt(link: ProcessLink, newest: plan.Plan) -> None:
    if newest.generation:
        link.report(plan.ProcessReport(plan_adopted=plan.PlanAdopted(generation=newest.generation)))


def ticking(link: ProcessLink) -> None:
    """Report one step after the other until told to end; the agent's master may be away meanwhile."""
    step = 0
    while True:
        step += 1
        link.report(plan.ProcessReport(progress=plan.Progress(step=step)))
        time.sleep(0.01)
        if any(order.HasField("shutdown") for order in link.receive_nowait()):
            link.report(plan.ProcessReport(finished=plan.Finished(step=step)))
            return


def fail(_link: ProcessLink) -> None:
    print("last words", file=sys.stderr)
    sys.exit(3)


def exhaust(_link: ProcessLink) -> None:
    raise MemoryError


def report_failure(link: ProcessLink) -> None:
    error = plan.ErrorDetail(code="PS-2001", cause="the task raised")
    link.report(plan.ProcessReport(failure=plan.Failure(error=error, traceback="Traceback ...")))
    sys.exit(1)


def be_stubborn(link: ProcessLink) -> None:
    """Ignore orders and SIGTERM, with a child that does so too."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    below = subprocess.Popen([sys.executable, "-c", "import signal; signal.signal(15, signal.SIG_IGN); signal.pause()"])
    print(f"below {below.pid}")
    link.report(plan.ProcessReport(trainer_ready=plan.TrainerReady()))
    while True:
        signal.pause()


def chatter(_link: ProcessLink) -> None:
    print("x" * 20_000)
    for number in range(20_000):
        print(f"line {number} " + "y" * 200)


def count(link: ProcessLink) -> None:
    samples = [
        plan.Counters.Sample(name="samples_total", value=5),
        plan.Counters.Sample(name="phase_seconds", labels={"phase": "pull"}, value=1.5),
        plan.Counters.Sample(name="step", value=7, gauge=True),
        plan.Counters.Sample(name="Bad name", value=7),
    ]
    link.report(plan.ProcessReport(beat=plan.Beat(progress=1)))
    link.report(plan.ProcessReport(counters=plan.Counters(samples=samples)))
    serve(link)


def mute(link: ProcessLink) -> None:
    """Never ready."""
    link.receive()


def beating(link: ProcessLink) -> None:
    heart = HeartbeatThread(link, plan.Beat)
    heart.start()
    serve(link)
    heart.close()


def cut_off(link: ProcessLink) -> None:
    link.report(plan.ProcessReport(beat=plan.Beat(unreached=plan.Unreached(generation=3, partitions=[1]))))
    serve(link)


def measuring(link: ProcessLink) -> None:
    link.report(plan.ProcessReport(beat=plan.Beat(speed=plan.Speed(microbatch_s=0.25, microbatches=4))))
    serve(link)


def use_bundle(link: ProcessLink) -> None:
    import users_module  # type: ignore[import-not-found]

    print(users_module.WORDS)
    serve(link)


def spy(link: ProcessLink) -> None:
    """Try to read the agent's key, which the job's code names; print what came of it, and who this process is."""
    try:
        got = Path(json.loads(link.start.spec_json)["key"]).read_text()
    except OSError as error:
        got = type(error).__name__
    own = {"scratch": os.access(link.start.scratch_dir, os.W_OK), "cache": os.access(link.start.cache_dir, os.W_OK)}
    join = any("PS_JOIN" in name or "secret" in value for name, value in os.environ.items())
    print(f"spied {json.dumps({'got': got, 'uid': os.getuid(), 'join': join, **own})}")
    serve(link)


def talk_nonsense(link: ProcessLink) -> None:
    os.write(link.fileno(), b"\xff\xff\xff\xff rubbish")
    serve(link)


MODES: dict[str, Callable[[ProcessLink], None]] = {
    "serve": serve,
    "ticking": ticking,
    "fail": fail,
    "exhaust": exhaust,
    "report_failure": report_failure,
    "be_stubborn": be_stubborn,
    "chatter": chatter,
    "count": count,
    "beating": beating,
    "cut_off": cut_off,
    "listening": listening,
    "measuring": measuring,
    "use_bundle": use_bundle,
    "spy": spy,
    "talk_nonsense": talk_nonsense,
}

if __name__ == "__main__":
    started = ProcessLink.from_environment()
    MODES[json.loads(started.start.spec_json)["mode"]](started)
