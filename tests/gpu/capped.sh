#!/usr/bin/env bash
# The record on cards of other sizes: a second process (hog.py) takes the rest of this GPU's memory.
#
#   DATA=folder OUT=folder tests/gpu/capped.sh [GIB:SLOTS ...]        80:64 48:512 24:512 by default
#
# SLOTS: TTT_SLOTS, with more documents than these, so that all are in use. Per size MODE=doctor, then 25 s of training, packing, scoring and
# adaptation. Printed: what was chosen for the size (rows, groups of slots), memory by phase, the verdict. KNOBS="A=1 B=2": more knobs.
# Nothing begins later than 60 s before LIMIT (590) seconds are over; what has a verdict is not made again. Exit status 1: a size without one.
set -uo pipefail
hog=
cases=("$@"); (( ${#cases[@]} )) || cases=(80:64 48:512 24:512)
data=$(realpath "${DATA:?folder with shards}") out=${OUT:?folder for results} limit=${LIMIT:-590} more=(${KNOBS:-})
tokenizer=$(realpath "${TOKENIZER:-$data/fineweb_8192_bpe.model}") end=$(( $(date +%s) + limit ))
unset DATA OUT LIMIT TOKENIZER KNOBS  # no knobs: train_gpt.py would warn of them
mkdir -p "$out"; out=$(realpath "$out"); here=$(cd "$(dirname "$0")" && pwd); cd "$here/../.."
export TORCHINDUCTOR_CACHE_DIR=$out/inductor TRITON_CACHE_DIR=$out/triton
left() { echo $(( end - $(date +%s) )); }
hog() {  # GiB: starts a hog and waits for its word
  python3 "$here/hog.py" "$1" > "$out/hog.txt" 2>&1 &
  hog=$!
  for (( s = 0; s < 600; s++ )); do grep -q '^free:' "$out/hog.txt" && return 0; kill -0 "$hog" 2> /dev/null || break; sleep 0.1; done
  return 1
}
release() { [[ -z $hog ]] || { kill "$hog"; wait "$hog"; } 2> /dev/null; hog=; }
trap release EXIT
failed=0
for case in "${cases[@]}"; do
  size=${case%:*} slots=${case#*:} name=card$size.$slots
  docs=$(( slots * 5 / 2 ))  # the last of the phases has half of them, and fills all slots
  echo "=== a card of $size GiB, $slots slots, $docs documents"
  if ! grep -qs '"verdict: ' "$out/$name/watched.jsonl"; then
    (( $(left) < 60 )) && { echo "no time left"; failed=1; continue; }
    hog "$size" || { echo "no hog: $(tail -2 "$out/hog.txt")"; release; failed=1; continue; }
    mkdir -p "$out/$name"; cp "$out/hog.txt" "$out/$name/"
    knobs=(PRESET=record ARTIFACT_DIR="$out/logs" DATA_PATH="$data" TOKENIZER_PATH="$tokenizer" MAX_WALLCLOCK_SECONDS=25 TRAIN_BATCH_TOKENS=262144
           VAL_DOCS="$docs" TTT_SLOTS="$slots" "${more[@]}")
    python3 "$here/rehearsal.py" run 1 "$out/$name.doctor" $(( $(left) - 25 )) MODE=doctor RUN_ID="$name.doctor" "${knobs[@]}" > /dev/null
    python3 "$here/rehearsal.py" run 1 "$out/$name" $(( $(left) - 25 )) RUN_ID="$name" "${knobs[@]}" > "$out/$name/console.txt"
    release
  fi
  echo "hog: $(cat "$out/$name/hog.txt")"
  python3 "$here/rehearsal.py" lines "$out/$name.doctor" 'memory:|train_batch_tokens|cached attention|step with|predicted|exit status|.*(Error|interrupted)' | sed 's/^/doctor: /'
  python3 "$here/rehearsal.py" lines "$out/$name" \
    'memory:|train_batch_tokens|cached attention|attention:|kernels:|phase with|peak memory|!! |result:|budget eval|verdict: |exit status|ended after|.*(Error|interrupted)'
  python3 "$here/rehearsal.py" phases "$out/$name" "$(sed -n 's/.* \([0-9]*\) MiB in use/\1/p' "$out/$name/hog.txt")"
  grep -qs '"exit status 0"' "$out/$name/watched.jsonl" && grep -qs '"verdict: ' "$out/$name/watched.jsonl" || failed=1
done
exit $failed
