#!/usr/bin/env bash
# The demo pipeline, good and made worse, through the gate: PASS unchanged, FAIL with k = 1 and a bad prompt, INVALID by
# another judge. usage: bench/demo_gate.sh [JUDGE] [ITEMS]    (24 minutes with qwen-0.5b-judge on 2 shared cores)
set -u
judge=${1:-qwen-0.5b-judge}
items=${2:-20}
dir=.ragate/demo-gate
mkdir -p "$dir"
good='{"k": 3, "chunk_words": 150, "model": "qwen-0.5b"}'
bad='{"k": 1, "chunk_words": 40, "model": "qwen-0.5b", "prompt": "Write a cheerful sentence about the weather and add a fun fact."}'

evaluate() { # folder, options, judge
  RAGATE_TARGET_OPTIONS="$2" ragate eval --testset testsets/llm-serving --target ragate.demo:pipeline --judge "$3" \
    --limit "$items" --out "$dir/$1" --baseline "$dir/none.json" -q >"$dir/$1.txt" 2>&1
}
check() { # name, wanted exit code
  ragate check "$dir/good" "$dir/$1"
  code=$?
  echo "check $1: exit $code (wanted $2)"
  [ "$code" = "$2" ] || failed=1
}

failed=0
evaluate good "$good" "$judge"
evaluate unchanged "$good" "$judge"
evaluate bad "$bad" "$judge"
evaluate other-judge "$good" smollm2-135m
check unchanged 0
check bad 1
check other-judge 3
exit $failed
