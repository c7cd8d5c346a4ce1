"""benchmarks/quality: the measured answers are generate's, the loss is the model's, cells are what they say."""

import json
from pathlib import Path

import mlx.core as mx
import pytest
from benchmarks.quality.cases import Case, call_grammar, make_cases
from benchmarks.quality.cells import SCRIPTS, Cell, Storage, cells, read_config
from benchmarks.quality.measure import decode, outcome, read_lines, run_case, run_cell
from benchmarks.quality.report import IMAGE, PAGE, RESULTS, collect, digest, filled, summary, table, wilson

import flash_moe_mlx
from flash_moe_mlx import Grammar, generate, load
from flash_moe_mlx.formats.checkpoint import Checkpoint

DEMO = Path(flash_moe_mlx.__file__).parent / "demo"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def demo():
    """The embedded model and its tokenizer."""
    model, tokenizer = load(DEMO, max_context=512, progress=False)
    yield model, tokenizer
    model.streaming.close()


@pytest.fixture(scope="module")
def case(demo) -> Case:
    """A call that the model gets right."""
    prompt = demo[1].apply_chat_template(
        [{"role": "user", "content": "What is the weather in Paris?"}], tools=[TOOL], add_generation_prompt=True,
        tokenize=False,
    )  # fmt: skip
    call = {"name": "get_weather", "arguments": {"city": "Paris"}}
    return Case(0, "tool_call", prompt, f"<tool_call>\n{json.dumps(call)}\n</tool_call>", [TOOL])


@pytest.mark.parametrize("answer", ["the model's", "another", "one that parts at its last token"])
def test_answers_and_loss_are_the_models(demo, case: Case, answer: str) -> None:
    model, tokenizer = demo
    prompt = tokenizer.encode(case.prompt, add_special_tokens=False)
    greedy = [*tokenizer.encode(case.answer, add_special_tokens=False), tokenizer.eos_token_id]
    expected = {"the model's": greedy, "another": [*greedy[:9], 77, 78, 79, greedy[-1]]}.get(answer, [*greedy[:9], 77])
    loss, written = decode(model, prompt, expected, 60)
    if answer == "one that parts at its last token":
        assert written[:9] == greedy[:9] and written[9] == greedy[9]
    else:
        assert written == greedy
    assert generate(model, tokenizer, prompt, max_tokens=60) == case.answer
    logits = model(mx.array([prompt + expected]))[0].astype(mx.float32)
    each = mx.logsumexp(logits, axis=-1)[:-1] - logits[mx.arange(len(logits) - 1), mx.array((prompt + expected)[1:])]
    assert loss == pytest.approx(each[len(prompt) - 1 :].sum().item(), rel=1e-3, abs=1e-3)


def test_expected_calls_obey_their_grammar(demo) -> None:
    tokenizer = demo[1]
    cases = make_cases(tokenizer, 48, 1)
    assert all(case.is_call for case in cases[:48])
    left_out = 0
    for case in cases[:48]:
        function = next(t["function"] for t in case.tools if f'"{t["function"]["name"]}"' in case.answer)
        left_out += any(f'"{name}":' not in case.answer for name in function["parameters"]["required"])
        matcher = Grammar.lark(call_grammar(case)).compile(tokenizer, 2048)
        assert matcher.consume_tokens(tokenizer.encode(case.answer, add_special_tokens=False)), case.answer
        assert matcher.is_accepting()
    assert left_out  # such calls are among them


def test_constrained_answers_obey(demo, case: Case) -> None:
    line = run_case(*demo, case, schema=True)
    assert line["right"] and line["outcome"] == "json"
    forced = Case(1, "tool_call", "Tell me a story.", case.answer, [TOOL])
    text = generate(*demo, forced.prompt, max_tokens=60, schema=Grammar.lark(call_grammar(forced)))
    assert text.startswith('<tool_call>\n{"name": "get_weather", "arguments": {')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "json"),
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}', "broken"),
        ('<tool_call>\n{"name": "f", "arguments": {"a": }}\n</tool_call>', "broken"),
        ('<tool_call>\n{"name": "f"}\n</tool_call>', "broken"),
        ("I can not do that.", "no call"),
    ],
)
def test_outcomes(text: str, expected: str) -> None:
    assert outcome(text) == expected


def test_a_cell_continues_where_it_stopped(tmp_path: Path, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def run(model, tokenizer, one: Case, *, schema: bool):
        calls.append(one.number)
        return {"case": one.number}

    monkeypatch.setattr("benchmarks.quality.measure.run_case", run)
    file, several = tmp_path / "cell.jsonl", [Case(n, "", "", case.answer, []) for n in range(4)]
    file.write_text('{"case": 0}\n{"case": 2}\n{"case')
    for _ in range(2):
        run_cell(Cell(Storage(4)), DEMO, several, file)
        assert calls == [1, 3]
    assert sorted(line["case"] for line in read_lines(file)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "storage",
    [
        Storage(16), Storage(2, 32), Storage(3, down_bits=6), Storage(2, layer_bits={0: 4, 1: 8}),
        Storage(4, 16, mode="nvfp4"),
    ],
    ids=lambda storage: storage.name,
)  # fmt: skip
def test_checkpoints_have_the_bytes_that_the_table_says(tmp_path_factory, storage: Storage) -> None:
    folder = tmp_path_factory.getbasetemp() / "quality"
    place = storage.write(SCRIPTS / "checkpoint", folder)
    checkpoint = Checkpoint.open(place)
    records = [checkpoint.layout(layer).record_bytes for layer in checkpoint.moe_layers]
    config = read_config(SCRIPTS / "checkpoint")
    assert sum(records) * 4 * (storage.bits > 0) == Cell(storage).bytes_per_token(config)


def test_cells_have_names_of_their_own() -> None:
    for k, layers in ((4, 8), (8, 6)):
        names = [cell.name for cell in cells(k, layers)]
        assert len(set(names)) == len(names) >= 30


def lines(right: list[bool], kind: str, outcomes: list[str]) -> list[dict]:
    return [
        {"case": i, "kind": kind, "right": r, "outcome": o, "nll": 0.5, "tokens": 5}
        for i, (r, o) in enumerate(zip(right, outcomes, strict=True))
    ]


def test_summary_compares_with_sixteen_bits_case_by_case() -> None:
    base = lines([True, True, False, True], "call", ["json"] * 4)
    cell = lines([True, False, True, False], "call", ["json", "broken", "json", "no call"])
    figures = summary(cell, base)
    assert figures["lost"] == 2 and figures["gained"] == 1
    assert figures["calls"] == {
        "right": 2, "of": 4, "perplexity": [1.10517, 1.10517, 1.10517], "json": 2, "broken": 1, "no_call": 1,
    }  # fmt: skip


def test_intervals() -> None:
    assert wilson(0, 500) == pytest.approx((0, 0.00762), abs=1e-5)
    assert wilson(250, 500) == pytest.approx((0.45634, 0.54366), abs=1e-5)


def test_unfinished_cells_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "16").symlink_to(SCRIPTS / "checkpoint")
    (folder / "cells").mkdir()
    rows = [json.dumps(line) for line in lines([True, False], "call", ["json", "broken"])]
    (folder / "cells" / "16.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "cells" / "4g64.jsonl").write_text(rows[0] + "\n")
    assert list(collect(tmp_path, (2, 0))["demo"]["cells"]) == ["16"]


def test_the_page_shows_the_results() -> None:
    root = Path(__file__).parents[2]
    models = json.loads(RESULTS.read_text())
    page = (root / PAGE).read_text()
    assert filled(page, models) == page
    assert all(table(model) in page for model in models.values())
    assert digest(models) in (root / IMAGE).read_text()
