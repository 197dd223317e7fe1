"""The hardware table: complete, sourced, and correctable line by line."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from expertly.errors import ExpertlyError
from expertly.plan.advice import advise
from expertly.plan.hardware import (
    Device,
    between,
    device_of,
    devices,
    flops_at,
    link_of,
    links,
)
from expertly.plan.known import shape_of
from expertly.plan.options import Need, options
from expertly.plan.precision import precision
from expertly.plan.speed import decode

NAMES = ["h100", "h800", "h200", "a100-80gb", "a100-40gb", "4090", "3090", "l4", "mi300x"]
NAMES += ["m4-max", "m3-ultra", "cpu"]


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def test_every_device_and_link_names_itself_its_source_and_links_that_there_are():
    assert list(devices()) == NAMES
    for name, device in devices().items():
        assert device.name == name
        assert len(device.source) > 15
        ends = (device.link, device.network, device.host_link)
        assert all(links()[end.name] == end for end in ends)
    for name, link in links().items():
        assert (link.name, bool(link.source)) == (name, True)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("h100", "bandwidth", 3.35e12),
        ("h200", "memory", 141e9),
        ("a100-80gb", "bandwidth", 2.039e12),
        ("4090", "watts", 450),
        ("cpu", "usd_per_hour", None),
        ("h800", "usd_per_hour", 2),
    ],
)
def test_figures_of_the_data_sheets(name, field, value):
    assert getattr(device_of(name), field) == value


def test_rates_are_dense_ones():
    """The sparse ones of the adverts are twice these; H800 has half of H100's NVLink or less."""
    assert flops_at(device_of("h100"), "bf16") == 989e12
    assert flops_at(device_of("l4"), "bf16") == 121e12
    assert link_of("nvlink4").bandwidth == 450e9, "900 GB/s is both directions"
    assert device_of("h800").link.bandwidth == 200e9


@pytest.mark.parametrize(
    ("device", "name", "rate"),
    [
        ("h100", "fp32", 67e12),
        ("h100", "fp8", 1979e12),
        ("a100-80gb", "fp8", 312e12),  # no fp8 units
        ("h100", "int4g32", 989e12),  # weights alone are small
        ("h100", "int8", 989e12),
        ("h100", "fp16", 989e12),
    ],
)
def test_what_computes_with_a_format(device, name, rate):
    assert flops_at(device_of(device), name) == rate


def test_a_device_without_an_fp32_rate_computes_it_as_bf16():
    assert flops_at(replace(device_of("h100"), flops={"bf16": 5.0}), "fp32") == 5


@pytest.mark.parametrize("spelt", ["H100", " h100 ", "h100"])
def test_names_in_any_case(spelt):
    assert device_of(spelt) == devices()["h100"]
    assert link_of("NVMe").name == "nvme"


@pytest.mark.parametrize(
    ("of", "name", "fix"),
    [
        (device_of, "a100", "write a100-80gb or a100-40gb"),
        (device_of, "RTX 4090", "write 4090"),
        (device_of, "mi300", "write mi300x"),
        (device_of, "m4 mex", "write m4-max"),
        (device_of, "", "choose one of 3090, 4090, a100-40gb, "),
        (link_of, "ethernet", "write ethernet-100 or ethernet-10"),
        (link_of, "???", "choose one of ethernet-10, "),
    ],
)
def test_e208_for_an_unknown_name(of, name, fix):
    flag = "--gpu" if of is device_of else "--link"
    said = f"E208. {flag} {re.escape(name)}: no (device|link) that we know. FIX: {fix}"
    with pytest.raises(ExpertlyError, match=said):
        of(name)


def test_e208_names_the_flag_that_said_it():
    with pytest.raises(ExpertlyError, match=r"E208. --offload floppy: no link that we know"):
        link_of("floppy", None, "--offload")
    with pytest.raises(ExpertlyError) as error:
        device_of("x" * 5000)
    assert len(str(error.value)) < 300


def test_a_users_file_corrects_lines_and_adds_devices(tmp_path):
    extra = written(
        tmp_path,
        """
        devices:
          "4090": {usd_per_hour: 0.3, flops: {bf16: 150e12}}
          B300:
            {memory: 288e9, bandwidth: 8e12, flops: {bf16: 2.5e15}, link: nvl, host_link: pcie5}
        links:
          nvl: {bandwidth: 900e9, source: "data sheet \\U0001F600"}
        """,
    )
    ours, theirs = device_of("4090"), device_of("4090", extra)
    assert theirs == replace(ours, usd_per_hour=0.3, flops={"bf16": 150e12})
    new = device_of("b300", extra)
    assert isinstance(new, Device)
    assert (new.name, new.watts, new.usd_per_hour) == ("B300", None, None)
    assert link_of("nvl", extra).source == "data sheet \U0001f600"
    assert "B300" not in devices(), "ours stays as it is"


USERS = """
    devices:
      mine: {memory: 24e9, bandwidth: 1e12, flops: {bf16: 2e14}, link: wire, host_link: bus}
      "4090": {network: wire}
    links:
      wire: {bandwidth: 20e9}
      bus: {bandwidth: 12e9}
      nvlink4: {bandwidth: 1e9}
"""


def test_a_users_links_are_those_of_its_devices(tmp_path):
    extra = written(tmp_path, USERS)
    mine = device_of("mine", extra)
    assert (mine.link.name, mine.link.bandwidth) == ("wire", 20e9)
    assert (mine.host_link.name, mine.host_link.bandwidth) == ("bus", 12e9)
    assert mine.network == link_of("infiniband-400"), "where the file says none"
    assert device_of("4090", extra).network == mine.link
    assert device_of("h100", extra).link.bandwidth == 1e9, "a corrected link, of our device"
    assert device_of("h100").link.bandwidth == 450e9


@pytest.mark.parametrize("gpus", [1, 2, 16])
def test_a_plan_uses_a_users_links(tmp_path, gpus):
    extra = written(tmp_path, USERS)
    mine, shape = device_of("mine", extra), shape_of("mixtral-8x7b")
    need = Need(device=mine, precision=precision(shape), gpus=gpus)
    ways = options(shape, need)
    away = [way.flags for way in ways if way.offloaded]
    assert all(flags.endswith("--offload bus") for flags in away)
    assert bool(away) == (gpus < 16)
    step = decode(shape, need.precision, mine, gpus=gpus)
    link = between(mine, gpus)
    assert link.name == ("infiniband-400" if gpus == 16 else "wire")
    reduced = 2 * (link.latency + (gpus - 1) / gpus * 4096 * 2 / link.bandwidth)
    assert step.by_part.get("links", 0.0) == pytest.approx((gpus > 1) * 2 * 32 * reduced)
    verdict = advise(shape, None, need, train_tokens=1e12)
    assert verdict.options == ways


def test_a_machine_has_eight_gpus():
    device = device_of("a100-80gb")
    assert [between(device, gpus).name for gpus in (1, 2, 8)] == ["nvlink3"] * 3
    assert [between(device, gpus).name for gpus in (9, 4096)] == ["infiniband-200"] * 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gpus: {}", "E201. gpus: unknown key"),
        ("devices: {h100: {memroy: 1}}", "E201. devices.h100.memroy: unknown key. FIX: .*memory"),
        ("devices: {new: {memory: 80e9}}", "E202. devices.new.bandwidth: required and missing"),
        ("devices: {4090: {memory: 1}}", "E202. devices: got .*, expected a mapping whose keys"),
        ("devices: {h100: {memory: 2026-01-01}}", "E202. devices.h100.memory: got"),
        ("devices: {h100: {memory: -1}}", "E202. devices.h100.memory: is -1.0, not above 0"),
        ("devices: {h100: {watts: 0}}", "E202. devices.h100.watts: is 0.0, not above 0"),
        ("devices: {h100: {flops: {bf16: 0}}}", "E202. devices.h100.flops.bf16: is 0.0, not"),
        ("devices: {h100: {flops: {fp32: 1}}}", "E202. devices.h100.flops: has no bf16"),
        ("devices: {h100: {usd_per_hour: -2}}", "E202. devices.h100.usd_per_hour: is -2.0, less"),
        ("devices: {h100: {kernel: -2}}", "E202. devices.h100.kernel: is -2.0, less"),
        ("devices: {h100: {link: wire}}", "E202. devices.h100.link: is wire, which links does not"),
        ("devices: {h100: {network: air}}", "E202. devices.h100.network: is air, which links does"),
        ("links: {sata: {bandwidth: 0}}", "E202. links.sata.bandwidth: is 0.0, not above 0"),
        ("links: {sata: {latency: -1}}", "E202. links.sata.latency: is -1.0, less than no time"),
        ("devices: [", "E203. .*mine.yaml: line 1: not YAML"),
    ],
)
def test_a_users_file_that_is_wrong(tmp_path, text, said):
    with pytest.raises(ExpertlyError, match=said):
        devices(written(tmp_path, text))


def test_e203_for_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ExpertlyError, match="E203"):
        links(tmp_path / "none.yaml")
