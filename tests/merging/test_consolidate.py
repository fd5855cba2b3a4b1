"""consolidate: the restored model is trained to agree with the owner's model and with the server model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedqsn_cli import client_train, consolidate, evaluate, export_proxy, inspect, mask, merge
from fedqsn_cli.errors import DataError, Diverged, GateFailed, InputError, OutputExists
from fedqsn_cli.merging.consolidate import _Consolidation
from fedqsn_cli.merging.ending.lora_student import LoraStudent
from fedqsn_cli.merging.ending.rate_search import RATES
from fedqsn_cli.merging.ending.rate_search import search as search_rates
from fedqsn_cli.merging.ending.weight_search import WEIGHTS, WeightTrial, rank
from fedqsn_cli.options import RecipeOptions
from fedqsn_cli.progress import SILENT, Silent
from fedqsn_cli.training.scoring.scoring import Evaluation
from fedqsn_cli.training.scoring.teachers import Distillation, Lesson, SoftTargets, kept_tokens, listen
from fedqsn_cli.training.steps.batching import IGNORED, Examples, Padding, collate
from support.families import build
from support.helpers import contents, nothing_written
from support.processes import run
from support.raw_safetensors import read_model, to_floats
from support.training_jobs import labelled, plain_texts

FAST: dict[str, Any] = {"steps": 6, "lr": 1e-3, "batch_size": 8, "written_examples": 24, "written_length": 6}


class Job:
    """A job after its last round: global/ and server/, base/ and data.jsonl."""

    def __init__(self, home: Path, family: str, dtype: str = "float32") -> None:
        self.home = home
        build(family, home / "base", tokenizer=True, seed=11, dtype=dtype)
        build(family, home / "global", tokenizer=True, seed=3, dtype=dtype)
        secret = {"key": home / "job.key", "preset": "strong", "public_base": home / "base"}
        export_proxy(
            home / "global", home / "proxy", client="ann", round=1, p2=0.1, ledger=home / "ledger.jsonl", **secret
        )
        mask(home / "global", home / "first", **secret)
        make = labelled if family == "bert" else plain_texts
        self.data = make(home / "data.jsonl")
        # Until the client has learned its data: teachers that differ by chance alone are nothing to come closer to.
        client_train(home / "proxy", home / "update", data=self.data, lr=3e-3, epochs=20)
        merge(home / "first", [home / "update"], home / "server", key=home / "job.key", ledger=home / "ledger.jsonl")

    def options(self, **more: Any) -> dict[str, Any]:
        return {"key": self.home / "job.key", "public_base": self.home / "base", **FAST, **more}

    def consolidate(self, out: Path, **more: Any) -> Any:
        return consolidate(self.home / "global", self.home / "server", out, **self.options(**more))


class Ended(Silent):
    """Ends trainings at a step, counted over all of them, as Ctrl-C does; counts those after it, too."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.steps = at, 0

    def advance(self, amount: float = 1, **facts: float) -> None:
        if "lr" in facts:
            self.steps += 1
            if self.steps == self.at:
                raise KeyboardInterrupt


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("classifier"), "bert")


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("language"), "llama")


def test_a_classifier_comes_closer_to_both_teachers(classifier: Job, tmp_path: Path) -> None:
    data = {"own_data": classifier.data, "transfer_data": classifier.data, "eval_data": classifier.data}
    done = classifier.consolidate(tmp_path / "out", **data | {"steps": 30})
    assert done.last_loss < done.first_loss
    assert (done.own_texts, done.transfer_texts, done.own_written, done.transfer_written) == (24, 24, False, False)
    for found, model in ((done.before, classifier.home / "global"), (done.after, tmp_path / "out")):
        assert found.loss == pytest.approx(evaluate(model, data=classifier.data).loss, rel=1e-6)
    assert inspect(tmp_path / "out").kind == "global model"


def test_a_language_model_writes_the_texts_that_are_missing(language: Job, tmp_path: Path) -> None:
    done = language.consolidate(tmp_path / "one", own_data=language.data)
    assert (done.own_texts, done.transfer_texts) == (12, 24)
    assert (done.own_written, done.transfer_written) == (False, True)
    neither = language.consolidate(tmp_path / "two")
    assert (neither.own_texts, neither.transfer_texts) == (24, 24)
    assert contents(tmp_path / "one") != contents(tmp_path / "two")


def test_no_step_worth_mentioning_is_the_restored_model(language: Job, tmp_path: Path) -> None:
    language.consolidate(tmp_path / "out", own_data=language.data, steps=1, lr=1e-30, blend=0.5)
    restore = {"restore": language.home / "server", "public_base": language.home / "base", "blend": 0.5}
    merge(language.home / "global", [], tmp_path / "restored", key=language.home / "job.key", **restore)
    assert read_model(tmp_path / "out").keys() == read_model(tmp_path / "restored").keys()
    for name, (dtype, bits) in read_model(tmp_path / "out").items():
        expected = read_model(tmp_path / "restored")[name]
        assert dtype == expected[0] and np.allclose(to_floats(bits, dtype), to_floats(expected[1], dtype)), name


def test_the_same_call_gives_the_same_bytes(language: Job, tmp_path: Path) -> None:
    for name in ("one", "two"):
        language.consolidate(tmp_path / name, own_data=language.data)
    language.consolidate(tmp_path / "other", own_data=language.data, seed=1)
    assert contents(tmp_path / "one") == contents(tmp_path / "two") != contents(tmp_path / "other")


def test_what_was_ended_goes_on_and_ends_with_the_same_bytes(language: Job, tmp_path: Path) -> None:
    whole = language.consolidate(tmp_path / "whole", own_data=language.data)
    for step in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            language.consolidate(tmp_path / "out", own_data=language.data, save_every="1", progress=Ended(step))
        assert not (tmp_path / "out").exists()
    done = language.consolidate(tmp_path / "out", own_data=language.data, save_every="1")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert done.last_loss == whole.last_loss
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_sixteen_bit_models_stay_in_their_dtype(tmp_path: Path) -> None:
    job = Job(tmp_path / "job", "llama", dtype="bfloat16")
    job.consolidate(tmp_path / "out", own_data=job.data)
    assert {dtype for dtype, _ in read_model(tmp_path / "out").values()} == {"BF16"}
    assert not (tmp_path / "out" / "fedqsn-residual.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transfer_data": None}, "writes no texts"),
        ({"own_data": None}, "writes no texts"),
        ({"public_base": None}, "--public-base"),
        ({"key": "no.key"}, "there is no key"),
        ({"blend": 1.5}, "out of range"),
        ({"steps": 0}, "--steps"),
        ({"transfer_weight": 0.0}, "--transfer-weight"),
        ({"written_length": 1}, "too short"),
        ({"save_every": "soon"}, "--save-every"),
    ],
)
def test_what_does_not_go_together_is_refused(
    classifier: Job, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    data = {"own_data": classifier.data, "transfer_data": classifier.data}
    with nothing_written(tmp_path), pytest.raises(InputError, match=message):
        classifier.consolidate(tmp_path / "out", **data | options)


def test_a_model_without_probabilities_is_refused(classifier: Job, tmp_path: Path) -> None:
    shutil.copytree(classifier.home / "global", tmp_path / "global")
    config = json.loads((tmp_path / "global" / "config.json").read_text())
    (tmp_path / "global" / "config.json").write_text(json.dumps({**config, "problem_type": "regression"}))
    options = classifier.options(own_data=classifier.data, transfer_data=classifier.data)
    with nothing_written(tmp_path), pytest.raises(InputError, match="for regression, which cannot be consolidated"):
        consolidate(tmp_path / "global", classifier.home / "server", tmp_path / "out", **options)


def test_wrong_files_are_refused(classifier: Job, tmp_path: Path) -> None:
    both = {"own_data": classifier.data, "transfer_data": classifier.data}
    with pytest.raises(DataError, match="no such file"):
        classifier.consolidate(tmp_path / "out", **both | {"own_data": tmp_path / "none.jsonl"})
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExists):
        classifier.consolidate(tmp_path / "out", **both)
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(InputError, match="not a server model"):
        consolidate(classifier.home / "global", classifier.home / "global", tmp_path / "out", **classifier.options())
    with pytest.raises(InputError, match="--key: is inside of"):
        classifier.consolidate(classifier.home, **both)


# ------------------------------------------------------------------------------------------------------- adapters


ADAPTERS: dict[str, Any] = {"method": "lora", "lora_r": 4, "lr": 1e-2}


def test_adapters_are_added_to_the_restored_model(
    language: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: dict[str, Tensor] = {}

    def write(student: LoraStudent, sink: Any) -> None:
        for name, (a, b, transposed) in student.method.factors().items():
            product = student.method.scaling * (b.double() @ a.double())
            trained[name] = product.t() if transposed else product
        written(student, sink)

    written = LoraStudent.write
    monkeypatch.setattr(LoraStudent, "write", write)
    done = language.consolidate(tmp_path / "out", own_data=language.data, **ADAPTERS | {"steps": 30})
    assert done.last_loss < done.first_loss
    restore = {"restore": language.home / "server", "public_base": language.home / "base", "blend": 0.9}
    merge(language.home / "global", [], tmp_path / "restored", key=language.home / "job.key", **restore)
    before = read_model(tmp_path / "restored")
    assert len(trained) > 10
    for name, (dtype, bits) in read_model(tmp_path / "out").items():
        if name not in trained:
            assert (bits == before[name][1]).all(), name
            continue
        assert trained[name].abs().max() > 1e-4
        expected = to_floats(before[name][1], dtype).astype(np.float64) + trained[name].float().double().numpy()
        assert (to_floats(bits, dtype) == expected.astype(np.float32)).all(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "restored"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in (tmp_path / "restored").iterdir()
    }


def test_a_classifiers_head_is_trained_in_full_beside_adapters(classifier: Job, tmp_path: Path) -> None:
    data = {"own_data": classifier.data, "transfer_data": classifier.data}
    for name in ("one", "two"):
        classifier.consolidate(tmp_path / name, **data, **ADAPTERS)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    whole, found = read_model(classifier.home / "global"), read_model(tmp_path / "one")
    moved = {name for name, (_, bits) in found.items() if (bits != whole[name][1]).any()}
    assert {"classifier.weight", "classifier.bias"} <= moved
    assert evaluate(tmp_path / "one", data=classifier.data).examples == 24


def test_options_of_adapters_go_with_the_method(classifier: Job, tmp_path: Path) -> None:
    data = {"own_data": classifier.data, "transfer_data": classifier.data}
    with nothing_written(tmp_path), pytest.raises(InputError, match="add --method lora"):
        classifier.consolidate(tmp_path / "out", **data, lora_r=4)
    with nothing_written(tmp_path), pytest.raises(InputError, match="--lora-r"):
        classifier.consolidate(tmp_path / "out", **data, method="lora", lora_r=4096)


# ----------------------------------------------------------------------------------------------- the weight by auto


AUTO: dict[str, Any] = {"transfer_weight": "auto", "steps": 3}


@pytest.fixture(scope="module")
def both_skills(language: Job, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Development data: the first and the last texts of the data."""
    lines = language.data.read_text().splitlines(keepends=True)
    folder = tmp_path_factory.mktemp("dev")
    (folder / "own.jsonl").write_text("".join(lines[:4]))
    (folder / "clients.jsonl").write_text("".join(lines[-4:]))
    return {"own_eval_data": folder / "own.jsonl", "eval_data": folder / "clients.jsonl"}


def test_auto_writes_what_the_weight_that_it_takes_gives(
    language: Job, both_skills: dict[str, Path], tmp_path: Path
) -> None:
    data = {"own_data": language.data, **both_skills}
    found = language.consolidate(tmp_path / "out", **data, **AUTO, own_tolerance=1.0, report=tmp_path / "page.html")
    search = found.search
    assert [trial.weight for trial in search.trials] == list(WEIGHTS)
    assert search.chosen == found.transfer_weight == min(search.trials, key=lambda trial: trial.clients.loss).weight
    del data["own_eval_data"]
    known = language.consolidate(tmp_path / "known", **data, transfer_weight=search.chosen, steps=3)
    assert contents(tmp_path / "out") == contents(tmp_path / "known")
    assert (known.after, known.before, known.last_loss) == (found.after, found.before, found.last_loss)
    page = (tmp_path / "page.html").read_text()
    assert "fedqsn consolidate" in page and f"{search.chosen:g} was taken" in page and "<script" not in page


def test_auto_asks_each_teacher_once(
    language: Job, both_skills: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def counted(model: Any, examples: Examples, *rest: Any) -> list[SoftTargets]:
        asked.append(len(examples))
        return listen(model, examples, *rest)

    monkeypatch.setattr("fedqsn_cli.merging.ending.distillation_data.listen", counted)
    language.consolidate(tmp_path / "out", own_data=language.data, **both_skills, **AUTO, own_tolerance=1.0)
    assert asked == [12, 24]


@pytest.mark.parametrize(
    ("tolerance", "message"),
    [(0, "loses more than 0 on the owner's skill"), (100, "better at what clients teach")],
)
def test_auto_writes_nothing_where_no_weight_keeps_the_owners_skill_or_none_teaches_anything(
    tolerance: float, message: str, language: Job, both_skills: dict[str, Path], tmp_path: Path
) -> None:
    data = {"transfer_data": language.data, "own_data": language.data, **both_skills}
    with nothing_written(tmp_path), pytest.raises(GateFailed, match=message):
        language.consolidate(tmp_path / "out", **data, **AUTO | {"lr": 0.5}, own_tolerance=tolerance)


def test_of_weights_that_keep_the_skill_the_one_that_learnt_most_is_first() -> None:
    def trial(weight: float, own: float, clients: float) -> WeightTrial:
        return WeightTrial(weight, *(Evaluation("causal-lm", 1, loss) for loss in (own, clients)))

    keeps, learns, loses, loses_more = trial(0.5, 1.0, 2.0), trial(1, 1.1, 1.5), trial(2, 1.2, 0.1), trial(4, 1.3, 0)
    ordered = sorted([loses_more, keeps, loses, learns], key=lambda one: rank(one, 1.1))
    assert ordered == [learns, keeps, loses, loses_more]


def test_auto_goes_on_where_it_was(language: Job, both_skills: dict[str, Path], tmp_path: Path) -> None:
    same = {"own_data": language.data, **both_skills, **AUTO, "own_tolerance": 1.0}
    language.consolidate(tmp_path / "whole", **same)
    with pytest.raises(KeyboardInterrupt):
        language.consolidate(tmp_path / "out", **same, save_every="1", progress=Ended(8))  # in the third training
    again = Ended()
    language.consolidate(tmp_path / "out", **same, save_every="1", progress=again)
    assert again.steps == 8  # one of the third training, and two trainings
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"own_eval_data": None}, "--own-eval-data"),
        ({"eval_data": None}, "--eval-data"),
        ({"transfer_weight": 1.0}, "nothing to search for"),
        ({"transfer_weight": "some"}, "neither a number nor auto"),
        ({"transfer_weight": 1.0, "own_eval_data": None, "own_tolerance": 0.1}, "--own-tolerance"),
        ({"transfer_weight": 1.0, "own_eval_data": None, "report": "page.html"}, "--report"),
        ({"own_tolerance": -1.0}, "--own-tolerance"),
    ],
)
def test_options_of_auto_go_with_auto(
    language: Job, both_skills: dict[str, Path], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with nothing_written(tmp_path), pytest.raises(InputError, match=message):
        language.consolidate(tmp_path / "out", own_data=language.data, **both_skills | AUTO | options)


# ------------------------------------------------------------------------------------------ the learning rate by auto


def test_auto_writes_what_the_rate_that_it_takes_gives(classifier: Job, tmp_path: Path) -> None:
    data = {"own_data": classifier.data, "transfer_data": classifier.data}
    found = classifier.consolidate(tmp_path / "out", **data, lr="auto", steps=40)
    trials = found.rates.trials
    assert [trial.lr for trial in trials] == list(RATES[: len(trials)])
    assert found.lr == found.rates.chosen == min(trials, key=lambda trial: trial.divergence).lr
    assert found.lr > RATES[0]  # 10 steps of 5e-5 change nearly nothing in a model this small
    known = classifier.consolidate(tmp_path / "known", **data, lr=found.lr, steps=40)
    assert contents(tmp_path / "out") == contents(tmp_path / "known")
    assert known.last_loss == found.last_loss and known.rates is None


def test_rates_are_compared_on_texts_that_trials_do_not_see(
    classifier: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    students: list[Path] = []

    def trained(job: Any, student: Any, encoder: Any, loss_of: Any, setting: Any, states: Any) -> Any:
        done = train(job, student, encoder, loss_of, setting, states)
        if setting.trial:
            students.append(tmp_path / f"{setting.lr:g}")
            student.loaded.model.save_pretrained(students[-1])
            student.loaded.tokenizer.save_pretrained(students[-1])
            seen.append({tuple(ids["input_ids"]) for ids in loss_of.own.examples.features})
        return done

    seen: list[set[tuple[int, ...]]] = []
    train = _Consolidation._train
    monkeypatch.setattr(_Consolidation, "_train", trained)
    data = {"own_data": classifier.data, "transfer_data": classifier.data}
    found = classifier.consolidate(tmp_path / "out", **data, lr="auto", steps=40)
    kept_out = range(0, 24, 10)
    assert len(students) == len(found.rates.trials) and all(len(some) <= 24 - len(kept_out) for some in seen)
    for trial, student in zip(found.rates.trials, students, strict=True):
        expected = sum(
            weight * _mean_divergence(classifier.home / name, student, classifier.data, kept_out)
            for name, weight in (("global", 1.0), ("server", 0.75))
        )
        assert trial.divergence == pytest.approx(expected, rel=1e-4)


def _mean_divergence(teacher: Path, student: Path, data: Path, rows: range) -> float:
    """KL(teacher ‖ student) on some rows, in nats, by transformers."""
    texts = [json.loads(line)["text"] for line in data.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(student)
    said = []
    for path in (teacher, student):
        model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
        with torch.no_grad():
            said.append(
                torch.cat([model(**tokenizer(texts[row], return_tensors="pt")).logits for row in rows]).log_softmax(-1)
            )
    return float(torch.nn.functional.kl_div(said[1], said[0], log_target=True, reduction="batchmean"))


def test_with_auto_a_tenth_is_kept_out_and_few_texts_are_whole() -> None:
    def lesson(count: int) -> Lesson:
        examples = Examples("classification", [{"input_ids": [row]} for row in range(count)], list(range(count)))
        return Lesson(examples, [SoftTargets(None, torch.full((1, 2), float(row))) for row in range(count)], 1.0)

    trained, kept_out = lesson(25).divided()
    assert [one["input_ids"] for one in kept_out.examples.features] == [[0], [10], [20]]
    assert [one.probabilities[0, 0].item() for one in kept_out.soft_targets] == kept_out.examples.targets == [0, 10, 20]
    assert sorted([*trained.examples.targets, *kept_out.examples.targets]) == list(range(25))
    assert len(lesson(9000).divided()[1].soft_targets) == 200
    few = lesson(9)
    assert few.divided() == (few, few)


def test_rates_are_tried_until_one_is_worse_or_diverges() -> None:
    def outcome(*values: float | None) -> tuple[float, int]:
        tried: list[float] = []

        def divergence(rate: float) -> float:
            tried.append(rate)
            value = values[len(tried) - 1]
            if value is None:
                raise Diverged("the loss is nan at step 2")
            return value

        search = search_rates(divergence)
        assert tried == list(RATES[: len(tried)])
        return search.chosen, len(tried)

    assert outcome(3, 2, 1, 0.5) == (RATES[3], 4)
    assert outcome(3, 2, 2.5) == (RATES[1], 3)
    assert outcome(3, 4) == (RATES[0], 2)
    assert outcome(3, 2, None) == (RATES[1], 3)
    with pytest.raises(Diverged):
        outcome(None)


def test_rate_and_weight_by_auto_go_on_where_they_were(
    language: Job, both_skills: dict[str, Path], tmp_path: Path
) -> None:
    same = {"own_data": language.data, **both_skills, **AUTO, "own_tolerance": 1.0, "lr": "auto"}
    whole = language.consolidate(tmp_path / "whole", **same)
    assert [trial.weight for trial in whole.search.trials] == list(WEIGHTS)
    assert whole.lr == whole.rates.chosen
    for left in (3, 4, 6):
        with pytest.raises(KeyboardInterrupt):
            language.consolidate(tmp_path / "out", **same, save_every="1", progress=Ended(left))
    language.consolidate(tmp_path / "out", **same, save_every="1")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_rate_is_a_number_or_auto(language: Job, tmp_path: Path) -> None:
    for lr, message in (("some", "neither a number nor auto"), (0.0, "--lr"), (-1.0, "--lr"), (float("nan"), "--lr")):
        with nothing_written(tmp_path), pytest.raises(InputError, match=message):
            language.consolidate(tmp_path / "out", own_data=language.data, lr=lr)


# ------------------------------------------------------------------------------------------------- the command line


def test_as_a_command(language: Job, tmp_path: Path) -> None:
    models = (language.home / "global", language.home / "server", "--public-base", language.home / "base")
    done = run(
        *("consolidate", *models, "--out", tmp_path / "out", "--key", language.home / "job.key"),
        *("--own-data", language.data, "--eval-data", language.data, "--steps", "3", "--written-examples", "8"),
        *("--written-length", "4", "--batch-size", "4"),
    )
    assert done.code == 0, done.err
    assert "written by the model itself" in done.out and "restored, blend 0.9" in done.out
    document = run(
        *("consolidate", *models, "--out", tmp_path / "two", "--key", language.home / "job.key"),
        *("--own-data", language.data, "--steps", "3", "--written-examples", "8", "--json"),
    )
    assert json.loads(document.out)["transfer_texts"] == 8


# ------------------------------------------------------------------------------------- the distance from a teacher


KEPT = 20


class Fixed(torch.nn.Module):
    """A language model that says the same whatever it reads: logits [positions, vocabulary]."""

    device = torch.device("cpu")

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        from transformers.modeling_outputs import CausalLMOutput

        length = input_ids.shape[1]
        return CausalLMOutput(logits=self.logits[:length].expand(len(input_ids), -1, -1))


def texts(lengths: list[int], ignored: int = 0) -> Examples:
    rows = [list(range(5, 5 + length)) for length in lengths]
    features = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
    return Examples("causal-lm", features, [[IGNORED] * (1 + ignored) + row[1 + ignored :] for row in rows])


def reference(teacher: Tensor, student: Tensor) -> float:
    """KL over the likeliest tokens and all others together, at one position, in numpy."""
    p, q = (np.exp(x - np.logaddexp.reduce(x)) for x in (teacher.double().numpy(), student.double().numpy()))
    kept = np.argsort(-p)[:KEPT]
    p, q = (np.append(x[kept], 1 - x[kept].sum()) for x in (p, q))
    return float((p * np.log(p / q)).sum())


def test_the_loss_is_the_divergence_over_the_likeliest_tokens_and_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    # patched: a limit of memory that no option sets; the real one is larger than the vocabulary of a tiny model
    monkeypatch.setattr("fedqsn_cli.training.scoring.teachers.LIKELIEST", KEPT)
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(6, 50, generator=generator) for _ in range(2))
    examples = texts([6, 4, 5], ignored=1)
    targets = listen(Fixed(teacher), examples, 2, Padding(0), SILENT)
    assert [len(one.probabilities) for one in targets] == [4, 2, 3]
    loss = Distillation([Lesson(examples, targets, 1.0)])
    batch = collate(loss.examples, [0, 1, 2], Padding(0))
    found = loss.backward(Fixed(student), "causal-lm", [batch], batch.count, RecipeOptions())
    positions = [position for length in (6, 4, 5) for position in range(1, length - 1)]
    assert batch.count == len(positions)
    assert found == pytest.approx(np.mean([reference(teacher[p], student[p]) for p in positions]), rel=1e-4)


def test_a_student_that_agrees_has_no_loss() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    examples = texts([6, 6])
    targets = listen(Fixed(logits), examples, 2, Padding(0), SILENT)
    loss = Distillation([Lesson(examples, targets, 1.0)])
    batch = collate(loss.examples, [0, 1], Padding(0))
    assert loss.backward(Fixed(logits), "causal-lm", [batch], batch.count, RecipeOptions()) == pytest.approx(
        0, abs=1e-5
    )


def test_teachers_count_by_their_weights_whatever_the_sizes_of_their_texts() -> None:
    few, many = texts([6]), texts([3] * 5)

    def sure(examples: Examples, kept: int) -> list[SoftTargets]:
        positions = [len(row) - 1 for row in examples.targets]  # type: ignore[arg-type]
        return [
            SoftTargets(torch.zeros(n, 1, dtype=torch.int32), torch.full((n, 1), 1.0 - 10.0**-kept)) for n in positions
        ]

    loss = Distillation([Lesson(few, sure(few, 6), 1.0), Lesson(many, sure(many, 6), 3.0)])
    assert len(loss.examples) == 10
    model = Fixed(torch.zeros(6, 2))
    batch = collate(loss.examples, list(range(10)), Padding(0))
    found = loss.backward(model, "causal-lm", [batch], batch.count, RecipeOptions())
    one = float(np.log(2))  # each position: a sure teacher, an undecided student
    assert found == pytest.approx(1.0 * one + 3.0 * one, rel=1e-3)


def test_long_data_keeps_fewer_tokens_and_stays_within_its_memory() -> None:
    assert kept_tokens(1000) == 1024
    assert 16 < kept_tokens(1_000_000) < 1024 and 8 * 1_000_000 * kept_tokens(1_000_000) <= 1 << 29
    assert kept_tokens(10**9) == 16
