"""The tasks that come with us: their data, losses and metrics."""

from __future__ import annotations

import gzip
import lzma
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pscluster.errors import DataError, TaskError
from psworker.tasks.byte_lm import ByteWindows
from psworker.tasks.gpt import GPT
from psworker.tasks.imdb import ImdbClassification, hash_words
from psworker.tasks.stdlib_lm import StdlibLm, stdlib_text
from psworker.tasks.synthetic import SyntheticLm, SyntheticNorm
from psworker.tasks.text_lm import TextLm
from psworker.trainer.preflight.prepare import prepare

GOLDEN_SEQUENCE = [22, 25, 2, 32, 3, 42, 34, 1]
TINY = {"layers": 1, "d_model": 16, "heads": 2}


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A tree of 120 Python files, and others that are no part of the text."""
    root = tmp_path / "lib"
    for number in range(120):
        path = root / ("package" if number % 2 else ".") / f"module{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"NUMBER = {number}\n" * 20)
    for left_out in ("site-packages/a.py", "test/b.py", "package/tests/c.py", "idlelib/d.py"):
        path = root / left_out
        path.parent.mkdir(parents=True)
        path.write_text("LEFT_OUT = 1\n")
    (root / "latin.py").write_bytes("LEFT_OUT = 'é'\n".encode("latin-1"))
    (root / "notes.txt").write_text("LEFT_OUT")
    return root


def files_of(text: bytes) -> set[bytes]:
    return set(text.split(b"\0")[1:])


def test_the_library_is_split_by_file_and_nothing_else_is_in_it(library: Path) -> None:
    train, held_out = (files_of(stdlib_text(library, side, 10**9)) for side in (False, True))

    assert len(train) + len(held_out) == 120
    assert not train & held_out
    assert 1 <= len(held_out) <= 15
    assert not any(b"LEFT_OUT" in file for file in train | held_out)


def test_the_split_does_not_move_when_a_file_is_added(library: Path) -> None:
    before = files_of(stdlib_text(library, True, 10**9))
    (library / "another.py").write_text("ANOTHER = 1\n")
    stdlib_text.cache_clear()

    assert before <= files_of(stdlib_text(library, True, 10**9))


def test_the_text_is_capped_at_a_whole_file(library: Path) -> None:
    text = stdlib_text(library, False, 3000)

    assert 2000 < len(text) <= 3000
    assert all(file.count(b"NUMBER") == 20 for file in files_of(text))
    with pytest.raises(DataError, match="for 100 bytes of text"):
        stdlib_text(library, False, 100)


def test_a_directory_without_sources_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"no Python source files under {tmp_path}"):
        stdlib_text(tmp_path, False, 1000)


def test_the_real_library_trains(make_spec: Any) -> None:
    spec = make_spec(
        "psworker.tasks.stdlib_lm:StdlibLm",
        {**TINY, "context": 32, "train_bytes": 300_000, "held_out_bytes": 100_000},
        evaluate={"metric": "bits_per_byte"},
    )

    prepared = prepare(spec, None, "cpu")

    assert prepared.held_out is not None
    assert len(prepared.train) > len(prepared.held_out) > 100


def test_windows_predict_every_byte_but_the_first_once() -> None:
    text = bytes(range(100))
    windows = ByteWindows(text, 9)

    targets = [value for i in range(len(windows)) for value in windows[i][1:].tolist()]

    assert targets == list(range(1, 100))
    assert windows[0].dtype == torch.uint8
    assert len(ByteWindows(b"", 9)) == len(ByteWindows(b"abc", 9)) == 0
    with pytest.raises(IndexError, match="no window 11 of 11"):
        windows[11]


@pytest.mark.parametrize("suffix", [".txt", ".xz", ".gz"])
def test_text_is_unpacked_and_its_last_tenth_held_out(tmp_path: Path, suffix: str) -> None:
    text = "Grüße, ".encode() * 100
    pack = {".txt": bytes, ".xz": lzma.compress, ".gz": gzip.compress}[suffix]
    path = tmp_path / f"text{suffix}"
    path.write_bytes(pack(text))
    task = TextLm(context=8)
    task.data_uri = str(path)

    train, held_out = task.texts()

    assert train + held_out == text
    assert len(held_out) == 90


def test_texts_of_a_directory_are_joined_by_name(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(name * 10)
    task = TextLm()
    task.data_uri = str(tmp_path)

    assert b"".join(task.texts()) == b"a.txt" * 10 + b"b.txt" * 10


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.txt", b"\xff\xfe", "is not UTF-8 text: invalid start byte at byte 0"),
        ("x.gz", b"plain", "cannot be read: Not a gzipped file"),
        ("x.xz", lzma.compress(b"text" * 99)[:-30], "cannot be read"),
        ("x.gz", gzip.compress(b"text" * 99, mtime=0)[:-12], "cannot be read"),
        ("x.txt", b"short", "training text has 5 bytes, too few"),
        (None, b"", "there is nothing at"),
    ],
)
def test_bad_text_is_named(tmp_path: Path, name: str | None, content: bytes, expected: str) -> None:
    path = tmp_path / (name or "missing")
    if name:
        path.write_bytes(content)
    task = TextLm()
    task.data_uri = str(path)

    with pytest.raises(DataError, match=expected):
        task.train_data()


def test_no_uri_is_named() -> None:
    with pytest.raises(DataError, match=r"data\.uri is empty"):
        TextLm().train_data()


def reviews(directory: Path) -> Path:
    rows = ["text,label"]
    for number in range(20):
        rows.append('"A bad, ""dull"" film.<br />Never again\x85",0' if number < 10 else f'"A fine film {number}!",1')
    for name in ("train.csv.xz", "test.csv.xz"):
        (directory / name).write_bytes(lzma.compress("\n".join(rows).encode()))
    return directory


def test_reviews_are_read_and_counted(make_spec: Any, tmp_path: Path) -> None:
    spec = make_spec(
        "psworker.tasks.imdb:ImdbClassification",
        {**TINY, "vocabulary": 64, "length": 12},
        data={"uri": str(reviews(tmp_path))},
        evaluate={"metric": "f1", "goal": "max"},
    )

    prepared = prepare(spec, None, "cpu")

    assert [prepared.train[i][1] for i in (0, 9, 10, 19)] == [0, 0, 1, 1]
    table = {check.name: check.detail for check in prepared.preflight.checks}
    assert "f1" in table["metrics"]
    assert "accuracy" in table["metrics"]


def test_a_limit_keeps_both_kinds_of_reviews(tmp_path: Path) -> None:
    task = ImdbClassification(limit=4)
    task.data_uri = str(reviews(tmp_path))

    assert [label for _, label in (task.train_data()[i] for i in range(4))] == [0, 0, 1, 1]


def test_f1_is_that_of_the_counts() -> None:
    counts = {"true_positive": 6.0, "true_negative": 1.0, "false_positive": 2.0, "false_negative": 1.0}
    statistics = {name: torch.tensor(value) for name, value in counts.items()}

    assert ImdbClassification().finalise(statistics) == {"accuracy": 0.7, "f1": 0.8}
    nothing = {name: torch.tensor(float(name == "true_negative")) for name in counts}
    assert ImdbClassification().finalise(nothing) == {"accuracy": 1.0, "f1": 0.0}


def test_hashed_words_are_stable_and_leave_out_padding() -> None:
    assert hash_words("A fine FILM<br />again", 100, 3) == hash_words("a fine film", 100, 9)
    assert 0 not in hash_words("every word of any text whatever", 2, 99)
    assert len(hash_words("", 100, 5)) == 1


def test_damaged_reviews_are_named(tmp_path: Path) -> None:
    task = ImdbClassification()
    task.data_uri = str(tmp_path)
    with pytest.raises(DataError, match=r"train\.csv\.xz cannot be read"):
        task.train_data()
    (tmp_path / "test.csv.xz").write_bytes(lzma.compress(b"a,b\n1,2\n"))
    with pytest.raises(DataError, match="does not have rows of text,label"):
        task.eval_data()


@pytest.mark.parametrize("task", [SyntheticLm(), SyntheticNorm()])
def test_synthetic_samples_are_functions_of_their_index(task: SyntheticLm | SyntheticNorm) -> None:
    first, again = task.train_data(), type(task)().train_data()
    held_out = task.eval_data()
    assert held_out is not None

    assert len(first) == 512
    assert str(first[7]) == str(again[7]) != str(first[8])
    assert str(held_out[7]) != str(first[7])
    with pytest.raises(IndexError, match="no sample 512 of 512"):
        first[512]


def test_synthetic_sequences_are_the_same_for_ever() -> None:
    assert SyntheticLm().train_data()[3][:8].tolist() == GOLDEN_SEQUENCE


def test_only_marked_samples_touch_the_expert() -> None:
    task = SyntheticNorm()
    model, data = task.build_model(), task.train_data()
    expert = dict(model.named_parameters())["expert.weight"]

    for indices, touched in ((range(1, 9), False), (range(33, 41), True)):
        model.zero_grad()
        task.loss(model, task.collate([data[i] for i in indices]))[0].backward()
        assert (expert.grad is not None) == touched


@pytest.mark.parametrize("task", [SyntheticLm(), SyntheticNorm()])
def test_synthetic_tasks_can_be_learned(task: SyntheticLm | SyntheticNorm) -> None:
    torch.manual_seed(0)
    model, data = task.build_model(), task.train_data()
    batch = task.collate([data[i] for i in range(64)])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss, weight = task.loss(model, batch)  # type: ignore[arg-type]
        optimizer.zero_grad()
        (loss / weight).backward()
        optimizer.step()
        losses.append(float(loss.detach()) / weight)

    assert losses[-1] < 0.8 * losses[0]


def test_a_position_sees_only_what_is_before_it() -> None:
    torch.manual_seed(0)
    model = GPT(16, 8, 2, 16, 2, 0.0).eval()
    tokens = torch.randint(16, (1, 8))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 16

    difference = (model(tokens) - model(changed)).abs().sum(-1)[0]

    assert torch.all(difference[:5] == 0)
    assert torch.all(difference[5:] > 0)
    assert model.head.weight is model.tokens.weight


def test_heads_must_divide_the_width(make_spec: Any) -> None:
    with pytest.raises(TaskError, match=r"d_model 33 .*heads 2"):
        prepare(make_spec(args={"d_model": 33}), None, "cpu")


def test_generation_is_pure_and_goes_on_past_the_context() -> None:
    torch.manual_seed(0)
    task = StdlibLm(**TINY, context=8)
    model = task.build_model()

    texts = [task.generate(model, "def ", 20, temperature, seed) for temperature, seed in ((1, 1), (1, 1), (1, 2))]

    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("def ")
    assert task.generate(model, "x", 5, 0, 1) == task.generate(model, "x", 5, 0, 2)
    assert task.generate(model, "", 3, 0, 1).startswith("\n")


def test_bits_per_byte_is_the_loss_in_bits() -> None:
    statistics = {"loss_sum": torch.tensor(8 * math.log(2)), "weight": torch.tensor(4.0)}

    assert StdlibLm().finalise(statistics)["bits_per_byte"] == pytest.approx(2.0)


def test_a_synthetic_task_generates_numbers() -> None:
    task = SyntheticLm()

    assert len(task.generate(task.build_model(), "1 2 99", 4, 0.5, 0).split()) == 7
