#!/usr/bin/env bash
# The whole way: a teacher's chains -> a cache of its outputs on them -> a student trained from the cache -> evaluation.
#
#   bash examples/traces_to_student.sh tiny                     # the bundled teacher, generated problems; 10 minutes
#   bash examples/traces_to_student.sh smollm2 /data/gsm8k      # SmolLM2-135M on 200 problems of GSM8K; about an hour
#
# Every command goes on where it was stopped: run the script again after a kill. PYTHON and OUT may be set.
set -euo pipefail
cd "$(dirname "$0")/.."
teacher=${1:?tiny or smollm2}
python=${PYTHON:-.venv/bin/python}
out=${OUT:-runs/$teacher-from-traces}
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}

case $teacher in
tiny)
  traces=(--config=configs/traces_tiny.py --config.problems.limit="${PROBLEMS:-3000}" --config.sampling.samples=1)
  recipe=(--config=configs/rtd_tiny.py --config.data.train.limit=0 --config.total_updates="${UPDATES:-600}")
  evaluation=(--tasks=synthetic --limit=120)
  ;;
smollm2)
  gsm8k=${2:?folder with the train.jsonl and test.jsonl of GSM8K}
  traces=(--config=configs/traces_smollm2.py --config.problems.location="$gsm8k" --config.examples.location="$gsm8k"
    --config.problems.limit="${PROBLEMS:-200}" --config.sampling.samples="${SAMPLES:-4}")
  # So few chains are right that there is nothing to make stages of.
  recipe=(--config=configs/rtd_smollm2.py --config.data.test.location="$gsm8k" --config.curriculum.enabled=False
    --config.data.validation_fraction=0.3 --config.total_updates="${UPDATES:-20}")
  evaluation=(--tasks=gsm8k --data_root="$(dirname "$gsm8k")" --limit=20 --few_shot=1 --max_new_tokens=160)
  ;;
*)
  echo "unknown teacher $teacher; use tiny or smollm2" >&2
  exit 2
  ;;
esac

echo "== 1. the teacher's chains, kept where the answer is right: $out/traces"
$python launch/traces.py "${traces[@]}" --workdir="$out/traces"

# 2. Where the steps of a chain end. The traces have one step a line, so their lines are the annotation. Another
#    segmentation belongs here, for the cache and the training alike: records are found by their boundaries.
recipe+=(--config.data.train.schema=stepwise --config.data.train.location="$out/traces")
recipe+=(--config.data.segmentation="${SEGMENTATION:-annotated}")

echo "== 3. the teacher's outputs on them: $out/cache"
$python launch/cache_teacher.py "${recipe[@]}" --config.teacher.cache="$out/cache"

echo "== 4. a student, without the teacher in memory: $out/run"
$python launch/train.py "${recipe[@]}" --config.teacher.cache="$out/cache" --workdir="$out/run"

echo "== 5. chain accuracy by depth: $out/evaluation"
$python launch/evaluate.py --model="$out/run" "${evaluation[@]}" --out="$out/evaluation"
