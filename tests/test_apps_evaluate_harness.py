"""Prompts, log-likelihoods and scores are those of lm-evaluation-harness, whose own task and model objects are asked.

The harness' tasks are built from its own YAML, with the rows of local files in place of the hub's.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny_run import write_teacher

from rtd_jax.apps.evaluate import EvaluateSettings, evaluate
from rtd_jax.data.formats import render
from rtd_jax.eval.tasks import load_problems
from rtd_jax.models.open import load_tokenizer

lm_eval = pytest.importorskip("lm_eval")

# Labels as ARC has them: letters or numbers, three to five choices. The words are the tiny tokenizer's.
ARC = [
    ("Which month has more boxes?", ["January", "May and June", "July"], "ABC", "B"),
    ("How many cups are in the box?", ["3", "14 cups", "some", "many of the cups"], "1234", "4"),
    ("Who has the most?", ["April", "all", "no", "the box", "May has 3 more"], "ABCDE", "A"),
    ("What is 2 more than 5?", ["7", "5 + 2 = 7", "2", "5"], "ABCD", "A"),
    ("How many books does May have?", ["May", "3 books", "4 more than June", "0"], "1234", "2"),
]
# White space at a line's end and twice in a row, as a few published rows have it.
GSM8K = [
    (
        f"Ann has {n} red and {n} blue pens.  How many has she?",
        f"{n}+{n}=<<{n}+{n}={2 * n}>>{2 * n} pens. \n#### {2 * n}",
    )
    for n in range(3, 15)
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_rows(folder, name, **splits):
    for split, rows in splits.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arc_rows():
    return [
        {"id": str(i), "question": question, "choices": {"text": texts, "label": list(labels)}, "answerKey": key}
        for i, (question, texts, labels, key) in enumerate(ARC)
    ]


def harness_task(folder, *yamls, shots=None):
    """The task of these YAML files of the harness (later ones win), reading `folder`/<split>.jsonl."""
    from lm_eval.api.task import ConfigurableTask

    config = {}
    for name in yamls:
        config |= yaml.safe_load((Path(lm_eval.__file__).parent / "tasks" / name).read_text(encoding="utf-8"))
    for key in ("include", "tag", "dataset_name", "validation_split"):
        config.pop(key, None)
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}
    config |= {"dataset_path": "json", "dataset_kwargs": {"data_files": files}}
    if shots is not None:
        config["num_fewshot"] = shots
    task = ConfigurableTask(config=config)
    task.set_fewshot_seed(1234)
    return task


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("harness") / "model", seed=3)


@pytest.mark.parametrize("shots", [0, 2])
def test_arc_is_that_of_the_harness_row_by_row(tmp_path, model_dir, shots):
    pytest.importorskip("torch")
    from lm_eval.models.huggingface import HFLM

    data = write_rows(tmp_path, "arc_challenge", test=arc_rows(), train=arc_rows()[::-1])
    settings = EvaluateSettings(
        (str(model_dir),),
        ("arc_challenge",),
        str(data),
        out=str(tmp_path / "out"),
        few_shot=shots,
    )
    found = json.loads(evaluate(settings, note=lambda _: None).read_text())["sections"]["arc_challenge"]["model"]
    records = [json.loads(line) for line in (tmp_path / "out" / "generations.jsonl").read_text().splitlines()]

    task = harness_task(data / "arc_challenge", "arc/arc_easy.yaml", "arc/arc_challenge.yaml", shots=shots)
    task.build_all_requests(limit=None, rank=0, world_size=1)
    lm = HFLM(pretrained=str(model_dir), device="cpu", dtype="float32", batch_size=4)
    answers = lm.loglikelihood(task.instances, disable_tqdm=True)
    theirs = {}
    for instance, answer in zip(task.instances, answers, strict=True):
        theirs.setdefault(instance.doc_id, []).append(answer)
    results = []
    for i, record in enumerate(records):
        np.testing.assert_allclose(record["log_likelihoods"], [x for x, _ in theirs[i]], atol=2e-4, rtol=0)
        results.append(task.process_results(task.eval_docs[i], theirs[i]))
        assert results[-1] == {
            "acc": float(record["chosen"] == record["answer"]),
            "acc_norm": float(record["chosen_norm"] == record["answer"]),
        }
    for ours, key in (("accuracy", "acc"), ("accuracy_norm", "acc_norm")):
        values = np.array([result[key] for result in results])
        assert found[ours]["mean"] == pytest.approx(values.mean())
        assert found[ours]["stderr"] == pytest.approx(values.std(ddof=1) / np.sqrt(len(values)))
    assert len({record["chosen"] for record in records}) > 1  # a constant choice would agree too easily
    assert found["chance"] == pytest.approx((1 / 3 + 1 / 4 + 1 / 5 + 1 / 4 + 1 / 4) / 5)
    # From the records alone, the same.
    again = EvaluateSettings(generations=str(tmp_path / "out" / "generations.jsonl"), out=str(tmp_path / "again"))
    assert json.loads(evaluate(again).read_text())["sections"]["arc_challenge"]["model"] == found


@pytest.mark.parametrize(("shots", "chat"), [(5, False), (0, False), (3, True)])
def test_gsm8k_prompts_are_those_of_the_harness(tmp_path, model_dir, shots, chat):
    rows = [{"question": question, "answer": answer} for question, answer in GSM8K]
    # Of other people: the harness would show a problem that is in both splits its own solution, which is not done here.
    asked = [row | {"question": row["question"].replace("Ann", "Zoe")} for row in rows[:6]]
    data = write_rows(tmp_path, "gsm8k", train=rows, test=asked)
    _prompts_are_the_harness_own(data, model_dir, shots, chat, len(rows[:6]))


def test_gsm8k_prompts_of_the_published_rows(shared_data, model_dir):
    _prompts_are_the_harness_own(shared_data, model_dir, 5, False, 40)


def _prompts_are_the_harness_own(data, model_dir, shots, chat, count):
    tokenizer = load_tokenizer(model_dir)
    tokenizer.chat_template = CHAT_TEMPLATE
    problems = load_problems("gsm8k", data_root=str(data), limit=count, few_shot=shots, chat=chat)
    task = harness_task(data / "gsm8k", "gsm8k/gsm8k.yaml", shots=shots)

    def chat_template(messages, add_generation_prompt=True):
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)

    for i, (trace, text, turns) in enumerate(zip(problems.items, problems.texts, problems.turns, strict=True)):
        theirs = task.fewshot_context(
            task.eval_docs[i],
            num_fewshot=shots,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,  # its default with a chat template
            chat_template=chat_template if chat else None,
        )
        # Its tokenizer puts the <bos> in front; ours has special tokens in the text.
        assert (
            render(tokenizer, trace.prompt, trace.completion, text, turns).prompt == ("" if chat else "<bos>") + theirs
        )
    assert problems.protocol["few_shot"] == shots
    examples = {(text.context, tuple(turns)) for text, turns in zip(problems.texts, problems.turns, strict=True)}
    assert len(examples) == (count if shots else 1)  # drawn anew for each


def test_math_verdicts_are_those_of_minerva_math(tmp_path):
    # The harness' process_results of minerva_math: verify(gold=parse(solution), target=parse(text)).
    math_verify = pytest.importorskip("math_verify")
    from rtd_jax.data.schemas.math import from_math
    from rtd_jax.eval.answers import answer_matches

    solution = "Adding gives $2x = 7$. So the answer is $\\boxed{\\frac{7}{2}}$."
    trace = from_math({"problem": "What is x?", "solution": solution, "level": "Level 3", "type": "Algebra"})
    texts = ["$\\boxed{3.5}$", "It is \\frac{7}{2}.", "x = 7/2", "\\boxed{\\frac72}", "3", "", "$\\boxed{7}$ or 3.5"]
    for text in texts:
        theirs = math_verify.verify(gold=math_verify.parse(solution), target=math_verify.parse(text))
        assert answer_matches(trace, text).math_verify == theirs, text
