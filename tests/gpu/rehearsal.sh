#!/usr/bin/env bash
# The record on one or two GPUs with an eighth of the contest's batch each, scored on a validation set of the contest's size.
#
#   DATA=folder OUT=folder tests/gpu/rehearsal.sh GPUS [KNOB=VALUE ...]
#
# DATA: fineweb_train_*.bin and fineweb_val_*.bin (.bin.xz are unpacked; four training shards of 20M tokens are enough, with more of them
# whole ones are left for training) and fineweb_8192_bpe.model, or TOKENIZER=path. LIMIT: seconds for all of it, 590 by default: a run that
# is not done by then is ended, and the table says how far it came. SET="documents tokens shards" makes a smaller one. One GPU cannot
# adapt to all of it in ten minutes: its evaluation gets 270 seconds, and the rest is scored plainly. GPUS=0 is for a CPU.
# Exit status 1: more than 600 s of evaluation on two GPUs, more than 80 GB on one, no verdict or a failed one.
set -uo pipefail
gpus=${1:?number of GPUs} data=$(realpath "${DATA:?folder with shards}") out=${OUT:?folder for results} limit=${LIMIT:-590} set=${SET:-}
shift
begin=$(date +%s); here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out"; out=$(realpath "$out")
if compgen -G "$data/*.bin.xz" > /dev/null; then
  mkdir -p "$out/unpacked"
  for f in "$data"/*.bin.xz; do n=$(basename "${f%.xz}"); [[ -s $data/$n || -s $out/unpacked/$n ]] || { xz -dc "$f" > "$out/unpacked/$n" & }; done
  wait
  cp -n "$data"/*.bin "$data"/*.model "$out/unpacked/" 2> /dev/null
  data=$out/unpacked
fi
tokenizer=$(realpath "${TOKENIZER:-$data/fineweb_8192_bpe.model}")
# none of these names is a knob, and train_gpt.py would warn of them
unset DATA OUT LIMIT SET TOKENIZER
python3 "$here/rehearsal.py" build "$data" "$out/data" $set || exit 1
echo "built in $(( $(date +%s) - begin )) s"
# each of an eighth of 786,432 tokens a GPU; later arguments win
knobs=(PRESET=record RUN_ID=rehearsal ARTIFACT_DIR="$out/logs" DATA_PATH="$out/data" TOKENIZER_PATH="$tokenizer" MAX_WALLCLOCK_SECONDS=60
       TRAIN_BATCH_TOKENS=$(( 98304 * (gpus > 0 ? gpus : 1) )))
[[ $gpus == 1 ]] && knobs+=(EVAL_WALLCLOCK_SECONDS=270)
python3 "$here/rehearsal.py" run "$gpus" "$out" $(( limit - 20 - ($(date +%s) - begin) )) "${knobs[@]}" "$@" > "$out/console.txt" 2>&1
python3 "$here/rehearsal.py" report "$gpus" "$out"
