"""psctl network rules: from what members advertise, or from options."""

from __future__ import annotations

import shlex

import pytest

from pscluster.cli.firewall import ANY_PORT, Ports, Rule, Server, lines, rules
from pscluster.v1 import agents_pb2
from tests.unit.cli.conftest import Psctl
from tests.unit.cli.fake_master import Serving
from tests.unit.cli.test_show import node_message

PORTS = Ports(
    master=("7070",), join=("7071",), servers=(Server(name="server-0", depot_port="7080", data_ports="7100-7199"),)
)


def of(host: str, direction: str) -> set[tuple[str, tuple[str, ...]]]:
    found = [rule for rule in rules(PORTS) if (rule.host, rule.direction) == (host, direction)]
    return {(rule.ports, rule.peers) for rule in found}


def test_who_accepts_what_from_whom() -> None:
    assert of("master", "accept") == {("7070", ("worker", "server", "user")), ("7071", ("new member",))}
    assert of("server", "accept") == {("7100-7199", ("worker", "server")), ("7080", ("server", "user"))}
    assert of("worker", "accept") == of("user", "accept") == of("master", "reach") == set()


def test_each_accepted_port_is_reached_by_those_it_is_for() -> None:
    for rule in rules(PORTS):
        if rule.direction == "accept" and rule.peers != ("new member",):
            for peer in rule.peers:
                assert (rule.ports, (rule.host,)) in of(peer, "reach")


@pytest.mark.parametrize("form", ["iptables", "nftables", "ufw"])
def test_commands_are_one_line_each_and_quote_as_a_shell_does(form: str) -> None:
    found = lines(rules(PORTS), form, ["server"])
    commands = [shlex.split(line) for line in found if not line.startswith("#")]
    assert {command[0] for command in commands} <= {"iptables", "ip6tables", "nft", "ufw"}
    ports = "7100-7199" if form == "nftables" else "7100:7199"
    assert any(ports in command for command in commands)
    assert any("7080" in command for command in commands)


def test_rules_of_a_cluster_that_runs(run: Psctl, serving: Serving) -> None:
    serving.fake.cluster.addresses.extend(["unix:/x", "127.0.0.1:7070", "10.0.0.1:7070", "[fd00::1]:7070"])
    serving.fake.cluster.join_addresses.append("10.0.0.1:7171")
    server = {"role": agents_pb2.ROLE_SERVER, "advertised_host": "10.0.0.3", "depot_address": "10.0.0.3:7080"}
    serving.fake.node_list = [
        node_message("server-0", **server, data_ports="7100-7110"),
        node_message("server-1", **server),
        node_message(advertised_host="10.0.0.4"),
    ]
    text = run("network", "rules", "--for", "server", "--for", "worker").stdout
    accepted = [line.split() for line in text.splitlines() if line.strip().startswith("accept")]
    assert {words[2] for words in accepted if words[1] == "tcp"} == {"7100-7110", ANY_PORT, "7080"}
    assert ["accept", "nothing"] in accepted
    assert text.count("7171") == 2


def test_a_cluster_on_this_machine_needs_no_rule(run: Psctl, serving: Serving) -> None:
    serving.fake.cluster.addresses.append("unix:/x")
    result = run("network", "rules")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr


def test_offline_asks_nobody(run_alone: Psctl) -> None:
    options = ["--master-port", "9000", "--depot-port", "9002", "--data-ports", "9100-9199"]
    text = run_alone("network", "rules", "--offline", *options).stdout
    for port in ("9000", "9001", "9002", "9100-9199"):
        assert f"tcp {port} " in text
    assert run_alone("network", "rules", *options).exit_code == 2
    for wrong in ("0", "9-8", "70000", "a-b"):
        assert run_alone("network", "rules", "--offline", "--data-ports", wrong).exit_code == 2


def test_rules_that_are_the_same_are_given_once() -> None:
    twice = Ports(master=("1",), join=("2",), servers=(PORTS.servers[0], PORTS.servers[0]))
    found: list[Rule] = rules(twice)
    assert len(found) == len(set(found))
