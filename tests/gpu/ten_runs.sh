#!/usr/bin/env bash
# Runs of the record in a row, half a minute of training each, with the cycle collector forced into every recording of a CUDA graph
# (forced_gc.py): how many of them come to a verdict?
#
#   DATA=folder OUT=folder tests/gpu/ten_runs.sh [RUNS [AT_ONCE [KNOB=VALUE ...]]]
#
# DATA: unpacked shards and fineweb_8192_bpe.model, or TOKENIZER=path. AT_ONCE: so many runs side by side, each on a GPU of its own.
# No run begins later than 90 s before LIMIT (590) seconds are over; the same command later goes on with those that have no verdict yet.
# Exit status 1: a run failed, or has not been made.
set -uo pipefail
runs=${1:-10} at_once=${2:-1} data=$(realpath "${DATA:?folder with shards}") out=${OUT:?folder for results} limit=${LIMIT:-590}
shift $(( $# < 2 ? $# : 2 ))
tokenizer=$(realpath "${TOKENIZER:-$data/fineweb_8192_bpe.model}") end=$(( $(date +%s) + limit ))
unset DATA OUT LIMIT TOKENIZER  # no knobs: train_gpt.py would warn of them
mkdir -p "$out"; out=$(realpath "$out"); cd "$(dirname "$0")/../.."
export TORCHINDUCTOR_CACHE_DIR=$out/inductor TRITON_CACHE_DIR=$out/triton
one() {  # number of the run, number of the GPU, knobs
  local i=$1 gpu=$2 begin; shift 2; begin=$(date +%s)
  env CUDA_VISIBLE_DEVICES="$gpu" PRESET=record RUN_ID="run$i" SEED=$(( 1336 + i )) ARTIFACT_DIR="$out/logs" DATA_PATH="$data" TOKENIZER_PATH="$tokenizer" \
    MAX_WALLCLOCK_SECONDS=30 TRAIN_BATCH_TOKENS=262144 VAL_DOCS=300 TTT_SLOTS=64 "$@" \
    timeout --signal TERM --kill-after 20 $(( end > begin + 1 ? end - begin : 1 )) python3 tests/gpu/forced_gc.py > "$out/run$i.txt" 2>&1
  echo "exit status $? after $(( $(date +%s) - begin )) s on GPU $gpu" >> "$out/run$i.txt"
}
for (( i = 1; i <= runs; )); do
  for (( gpu = 0; gpu < at_once && i <= runs; i++ )); do
    grep -qs "^verdict: " "$out/run$i.txt" && continue
    (( end - $(date +%s) < 90 )) && break 2
    one "$i" "$gpu" "$@" &
    gpu=$(( gpu + 1 ))
  done
  wait
done
wait
good=0
for (( i = 1; i <= runs; i++ )); do
  f=$out/run$i.txt
  [[ -f $f ]] || { echo "run $i: not begun"; continue; }
  echo "run $i: $(grep -m1 '^val_bpb:[0-9]' "$f") $(grep -h '^forced collections' "$f") $(tail -1 "$f")"
  echo "       $(grep '^verdict: ' "$f" || { grep -m1 'Error\|interrupted' "$f" || tail -2 "$f"; } | cut -c1-400)"
  grep -q '^verdict: ' "$f" && grep -q '^exit status 0 ' "$f" && good=$(( good + 1 ))
done
echo "$good of $runs runs ended with a good verdict"
(( good == runs ))
