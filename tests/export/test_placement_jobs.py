"""Jobs that hide a part of the model, or some layers more than others: from the key to the restored model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedqsn_cli import audit, export_proxy, inspect, mask, merge
from fedqsn_cli.artifacts.ledger import Release, read
from fedqsn_cli.checkpoint import Checkpoint
from fedqsn_cli.errors import InputError, KeyFileError
from fedqsn_cli.exposure.exposure import exposure
from fedqsn_cli.masks import job_key
from fedqsn_cli.masks.job_key import JobKey
from support.deep_models import deep
from support.deep_models import deep_model as model
from support.helpers import (
    contents,
    drawn,
    hidden_elements,
    make_config,
    noise,
    nothing_written,
    read_model,
    send,
    to_floats,
    visible_elements,
    write_model,
)
from support.scenario import KINDS, few, replaced

SCHEDULE = "0-1=0.9,3=0.5,embeddings=0.2"


# ---------------------------------------------------------------- what is written


def test_manifests_of_a_job_without_these_options_have_no_new_field(tmp_path: Path) -> None:
    source = model(tmp_path / "model")
    job = {"key": tmp_path / "job.key", "ledger": tmp_path / "ledger.jsonl"}
    export_proxy(str(source), tmp_path / "proxy", client=["ann"], round=1, p1=0.3, p2=0.1, **job)
    key, line = json.loads(job["key"].read_text()), json.loads(job["ledger"].read_text())
    assert set(key) == {"format", "key", "p1", "axis", "plan", "overrides", "groups", "clear", "seal"}
    assert key["overrides"] == {"rule": []} and "p1_least" not in line
    assert job_key.load(job["key"]).ratios == {}


def test_a_key_keeps_ratios_and_the_ledger_the_least_of_them(tmp_path: Path) -> None:
    source = model(tmp_path / "model")
    job = {"key": tmp_path / "job.key", "ledger": tmp_path / "ledger.jsonl"}
    export_proxy(str(source), tmp_path / "proxy", client=["ann"], round=1, p1=0.3, p2=0.1, p1_schedule=SCHEDULE, **job)
    found = job_key.load(job["key"])
    assert found.overrides == {"rule": [], "p1": {"0-1": 0.9, "3": 0.5, "embeddings": 0.2}}
    assert found.ratio("bert.encoder.layer.3.output.dense.weight") == 0.5
    assert found.ratio("bert.encoder.layer.2.output.dense.weight") == 0.3
    assert [(line.p1, line.p1_least) for line in read(job["ledger"])] == [(0.3, 0.2)]
    assert b"0.2" not in (tmp_path / "proxy" / "proxy.json").read_bytes()


@pytest.mark.parametrize("ratios", [[], {"nobody": 0.5}, {"classifier.weight": 1.0}, {"classifier.weight": "0.5"}])
def test_a_key_with_malformed_ratios_is_refused(tmp_path: Path, ratios: Any) -> None:
    mask(str(model(tmp_path / "model")), tmp_path / "server", key=tmp_path / "job.key", p1=0.3)
    path = tmp_path / "job.key"
    path.write_text(json.dumps({**json.loads(path.read_text()), "ratios": ratios}))
    with pytest.raises(KeyFileError):
        job_key.load(path)


def test_a_key_whose_ratios_are_not_those_of_its_plan_is_refused(folder: Path) -> None:
    source = str(model(folder / "model"))
    mask(source, folder / "server", key=folder / "job.key", p1=0.3, p1_schedule="0=0.9")
    path = folder / "job.key"
    path.write_text(json.dumps({**json.loads(path.read_text()), "ratios": {}}))
    with nothing_written(folder), pytest.raises(KeyFileError, match="was edited"):
        mask(source, folder / "again", key=path)


# ---------------------------------------------------------------- one job, one of each


ASKED = {"where": "outputs", "layers": "embeddings,0-2", "p1_schedule": "0=0.9,embeddings=0.2"}
SECOND = [
    ({"where": "all"}, "where outputs, but where all was asked for"),
    ({"where": "mlp"}, "where outputs, but where mlp"),
    ({"layers": "0-3"}, "layers embeddings,0-2, but layers 0-3"),
    ({"p1_schedule": "0=0.8"}, "p1 schedule 0=0.9,embeddings=0.2, but p1 schedule 0=0.8"),
]


@pytest.mark.parametrize(("second", "problem"), SECOND)
@pytest.mark.parametrize("start", ["model", "server"])
def test_a_second_where_layers_or_schedule_is_refused(
    folder: Path, start: str, second: dict[str, str], problem: str
) -> None:
    source = model(folder / "model")
    mask(str(source), folder / "server", key=folder / "job.key", p1=0.3, **ASKED)
    job = {"key": folder / "job.key", "ledger": folder / "ledger.jsonl", "client": ["ann"], "round": 1, "p2": 0.1}
    with nothing_written(folder), pytest.raises(KeyFileError, match=re.escape(problem)):
        export_proxy(str(folder / start), folder / "proxy", **job, **second)


def test_a_job_without_them_takes_none_later(folder: Path) -> None:
    source = model(folder / "model")
    mask(str(source), folder / "server", key=folder / "job.key", p1=0.3, where="all")
    for name, value in ASKED.items():
        with pytest.raises(KeyFileError, match="the key belongs to a job with (where all|layers unlimited|no p1 sch)"):
            mask(str(source), folder / "again", key=folder / "job.key", **{name: value})


def test_they_need_not_be_said_again_but_may_in_other_words(folder: Path) -> None:
    source = model(folder / "model")
    mask(str(source), folder / "server", key=folder / "job.key", p1=0.3, **ASKED)
    job = {"key": folder / "job.key", "ledger": folder / "ledger.jsonl", "client": ["ann"], "round": 1, "p2": 0.1}
    export_proxy(str(source), folder / "one", **job)
    again = {"where": "outputs", "layers": "0,1,2,embeddings", "p1_schedule": "embeddings=0.20,0-0=0.9"}
    export_proxy(str(source), folder / "two", **job, **again)
    export_proxy(str(folder / "server"), folder / "three", **job, **again)
    assert contents(folder / "one") == contents(folder / "two") == contents(folder / "three")


def test_a_plan_file_and_the_options_may_not_contradict_each_other(folder: Path) -> None:
    source = model(folder / "model")
    (folder / "plan.toml").write_text('where = "mlp"\n[[rule]]\nmatch = "classifier.weight"\nmasked = true\n')
    job = {"key": folder / "job.key", "p1": 0.3, "plan": folder / "plan.toml"}
    with nothing_written(folder), pytest.raises(InputError, match="--where: the plan file says where mlp"):
        mask(str(source), folder / "server", **job, where="all")
    mask(str(source), folder / "server", **job, layers="0-1")
    assert job_key.load(folder / "job.key").overrides == {
        "rule": [{"match": "classifier.weight", "masked": True}],
        "where": "mlp",
        "layers": "0-1",
    }
    mask(str(source), folder / "again", key=folder / "job.key", plan_file=folder / "plan.toml")
    assert contents(folder / "again") == contents(folder / "server")


# ---------------------------------------------------------------- from the mask to the restored model


CHOICES = st.fixed_dictionaries(
    {},
    optional={
        "where": st.sampled_from(["outputs", "mlp", "attention"]),
        "layers": st.sampled_from(["embeddings,0-2", "1,3", "0-3"]),
        "p1_schedule": st.sampled_from([SCHEDULE, "0=0.95,1=0,2=0.3"]),
    },
)


@few(20)
@given(
    st.sampled_from(["bert", "gpt2", "llama", "llama-tied", "t5", "mixtral", "gpt_oss"]),
    CHOICES,
    st.sampled_from(["neuron", "input", "element"]),
    st.sampled_from(["nf4", "int8", "nf3"]),
    st.sampled_from(KINDS),
)
def test_i1_hidden_weights_change_no_byte_wherever_they_are(
    tmp_path_factory: Any, name: str, choices: dict[str, Any], axis: str, format: str, kind: str
) -> None:
    folder = tmp_path_factory.mktemp("i1")
    source = model(folder / "model", name)
    job = {"key": folder / "job.key", "ledger": folder / "ledger.jsonl", "client": ["ann"], "round": 1, "p2": 0.2}
    export_proxy(str(source), folder / "proxy", p1=0.5, axis=axis, format=format, **job, **choices)
    hidden = hidden_elements(source, folder / "job.key")
    assert any(flags.any() for flags in hidden.values())
    changed = {n: (d, replaced(bits, d, hidden[n], kind)) for n, (d, bits) in deep(name).items()}
    write_model(folder / "changed", changed, make_config(name))
    export_proxy(str(folder / "changed"), folder / "again", format=format, **job)
    assert contents(folder / "again") == contents(folder / "proxy")
    shown = visible_elements(folder / "proxy")
    for tensor, flags in hidden.items():
        if tensor in shown:
            assert not (flags.reshape(shown[tensor].shape) & shown[tensor]).any()
            assert flags.sum() <= (~shown[tensor]).sum()
        else:
            assert not flags.any()


@pytest.mark.parametrize("axis", ["neuron", "element"])
def test_a_round_with_a_schedule_is_merged_and_restored_with_the_scale_of_each_tensor(folder: Path, axis: str) -> None:
    source = model(folder / "model", hidden=33)
    job = {"key": folder / "job.key", "ledger": folder / "ledger.jsonl"}
    places = {"p1_schedule": SCHEDULE, "layers": "embeddings,0-3"}
    mask(str(source), folder / "server", key=job["key"], p1=0.3, axis=axis, **places)
    names = ("ann", "bob")
    export_proxy(str(folder / "server"), folder / "p-{client}", client=names, round=1, p2=0.25, **job)
    updates = [send(folder / f"p-{name}", folder / f"u-{name}", noise(3), examples=len(name)) for name in names]
    merge(str(folder / "server"), updates, folder / "merged", **job)
    merge(str(source), [], folder / "restored", key=job["key"], restore=str(folder / "merged"), blend=0.5)
    before, after, result = (read_model(folder / name) for name in ("model", "merged", "restored"))
    hidden = hidden_elements(source, job["key"])
    factors = set()
    for name, flags in hidden.items():
        if before[name][0] != "F32":
            continue
        w, x, found = (to_floats(tensors[name][1], tensors[name][0]) for tensors in (before, after, result))
        s = flags.size / (flags.size - flags.sum())
        factors.add(round(float(s), 2) if flags.any() else 1.0)
        np.testing.assert_array_equal(x[flags], 0)
        np.testing.assert_allclose(found, np.where(flags, 0.5 * w, x * (s + 0.5 * (1 - s))), rtol=1e-6)
        assert (x[~flags] != w[~flags]).any()
    assert len(factors) >= 4  # ratios 0.9, 0.5, 0.3, 0.2 and none


def test_the_scale_in_a_proxy_and_in_a_loaded_server_model_is_that_of_each_tensor(folder: Path) -> None:
    from fedqsn_cli.models.dense import load_dense

    source = model(folder / "model", hidden=32)
    job = {"key": folder / "job.key", "ledger": folder / "ledger.jsonl"}
    mask(str(source), folder / "server", key=job["key"], p1=0.3, p1_schedule=SCHEDULE)
    export_proxy(str(folder / "server"), folder / "proxy", client=["ann"], round=1, p2=0.0, format="none", **job)
    with Checkpoint.open(folder / "server") as server, Checkpoint.open(folder / "proxy") as proxy:
        loaded, sent = load_dense(server), load_dense(proxy)
    for name, flags in hidden_elements(source, job["key"]).items():
        assert np.array_equal(loaded[name].numpy(), sent[name].numpy()), name
        dtype, bits = read_model(source)[name]
        if dtype != "F32":
            continue
        w = to_floats(bits, dtype)
        s = np.float32(flags.size / (flags.size - flags.sum()))
        np.testing.assert_allclose(sent[name].numpy(), np.where(flags, 0, w * s), rtol=1e-6)


# ---------------------------------------------------------------- what is seen, and the audit


def seen_by_hand(job: JobKey, releases: list[Release]) -> list[float]:
    """Share of all parameters that each client has seen after its releases, unit by unit."""
    seen: dict[str, dict[str, Any]] = {}
    for line in releases:
        mine = seen.setdefault(line.client, {})
        for group, (units, _) in job.groups.items():
            ratio = job.ratios.get(group, job.p1)
            hidden = drawn(job.key, ("server",), group, np.ones(units, np.bool_), ratio)
            scope = ("client", line.client, *([str(line.round)] if line.schedule == "fresh" else []))
            shown = ~(hidden | drawn(job.key, scope, group, ~hidden, line.p2))
            mine[group] = mine.get(group, np.zeros(units, np.bool_)) | shown
    total = job.clear + sum(size for _, size in job.groups.values())
    return [
        (job.clear + sum(mine[group].mean() * size for group, (_, size) in job.groups.items())) / total
        for mine in seen.values()
    ]


@few(25)
@given(st.dictionaries(st.sampled_from(["a", "b", "c"]), st.sampled_from([0.0, 0.2, 0.9])), st.sampled_from([0.0, 0.4]))
def test_exposure_counts_each_group_with_its_own_ratio(ratios: dict[str, float], p1: float) -> None:
    groups = {"a": (40, 4000), "b": (17, 340), "c": (130, 1300)}
    job = JobKey(bytes(32), p1, "neuron", "0" * 64, {}, groups, 100, ratios)
    text = {"proxy_id": "0" * 64, "proxy_sha256": "0" * 64, "plan": "0" * 64, "model_digest": "0" * 64, "job": "0" * 64}
    lines = [
        Release(
            client=client,
            round=number,
            schedule="fresh",
            p1=p1,
            p2=0.5,
            rescale=True,
            fill="zero",
            quantization=None,
            **text,
        )
        for client, number in (("ann", 1), ("bob", 1), ("ann", 2))
    ]
    found = exposure(job, lines)
    assert [client.shares[-1] for client in found.clients] == pytest.approx(seen_by_hand(job, lines))
    hidden = sum(size * round(ratios.get(g, p1) * n) / n for g, (n, size) in groups.items())
    assert found.hidden_share == pytest.approx(hidden / (100 + 4000 + 340 + 1300))


def test_exposure_of_a_real_job_is_what_its_proxies_show(folder: Path) -> None:
    source = model(folder / "model", "llama")
    job = {"key": folder / "job.key", "ledger": folder / "ledger.jsonl"}
    export_proxy(
        str(source),
        folder / "proxy",
        client=["ann"],
        round=1,
        p1=0.4,
        p2=0.2,
        where="outputs",
        layers="embeddings,0-2",
        p1_schedule="0=0.9,embeddings=0.1",
        **job,
    )
    shown, total = visible_elements(folder / "proxy"), 0
    seen = 0
    for name, (_, bits) in read_model(source).items():
        total += bits.size
        seen += int(shown[name].sum()) if name in shown else bits.size
    found = exposure(job_key.load(job["key"]), read(job["ledger"]))
    assert found.clients[0].shares[-1] == pytest.approx(seen / total)


def test_the_audit_knows_the_ratio_of_each_group(folder: Path) -> None:
    source = model(folder / "model", "llama")
    job = {"key": folder / "job.key", "ledger": folder / "ledger.jsonl"}
    export_proxy(
        str(source),
        folder / "{client}",
        client=["ann", "bob"],
        round=1,
        p1=0.6,
        p2=0.2,
        where="outputs",
        p1_schedule="0=0.9,embeddings=0.1",
        **job,
    )
    proxies = [folder / "ann", folder / "bob"]
    whole = audit(proxies, truth=source, **job)
    assert [one for one in whole.findings if one.severity == "hard"] == []
    rebuilt = [check for check in whole.checked if check.rule in {"FQ001", "FQ004", "FQ005"}]
    assert rebuilt and {check.status for check in rebuilt} == {"pass"}
    ledger_only = audit(proxies, ledger=job["ledger"])
    assert [one.rule for one in ledger_only.findings if one.rule == "FQ004"] == []


def test_inspect_tells_where_and_how_much(folder: Path) -> None:
    source = model(folder / "model")
    mask(str(source), folder / "server", key=folder / "job.key", p1=0.3, **ASKED)
    facts = inspect(folder / "job.key").facts
    assert (facts["where"], facts["layers"]) == ("outputs", "embeddings,0-2")
    assert facts["p1_schedule"] == "0=0.9,embeddings=0.2"
    found = inspect(folder / "server", show_plan=True)
    assert found.plan is not None and found.facts["where"] == "outputs"
    rows = {row.name: row for row in found.plan}
    assert rows["bert.encoder.layer.0.output.dense.weight"].p1 == 0.9
    assert rows["bert.encoder.layer.1.output.dense.weight"].p1 == 0.3
    assert rows["bert.encoder.layer.3.output.dense.weight"].origin == "rules, --layers"
