#!/usr/bin/env bash
# A rented GPU from its first minute to its last: the tests that need one, the tile of the MLP's kernel, then a sweep.
#
#   tests/gpu/hour.sh SECONDS SPEC [OUT] [KNOB=VALUE...]     e.g. tests/gpu/hour.sh 3600 records/examples/final.toml sweeps
#
# Knobs (DATA_PATH=...) go in place of the spec's base. A sweep that the time cuts off goes on where it stopped, on another machine
# too, if OUT goes along: its small files are enough, save where a setting with MODE waits for the control's artifact.
set -uo pipefail
seconds=${1:?seconds} spec=${2:?a spec of records/sweep.py} out=${3:-sweeps}
shift $(( $# < 3 ? $# : 3 ))
end=$(( $(date +%s) + seconds ))
spec=$(realpath "$spec"); cd "$(dirname "$0")/../.."
mkdir -p "$out"
left() { echo $(( end - $(date +%s) > 1 ? end - $(date +%s) : 1 )); }
say() { echo "[$(date +%T), $(left) s left] $*"; }
timeout "$(left)" python3 -m pytest tests/gpu -q -p no:cacheprovider > "$out/tests.txt" 2>&1
say "tests: $(tail -1 "$out/tests.txt")"
timeout "$(left)" python3 tests/gpu/tiles.py > "$out/tiles.txt" 2>&1
say "tiles: $(grep -m1 "^forward" "$out/tiles.txt") | $(grep -m1 "^backward" "$out/tiles.txt") | $(grep -m1 "^attention with" "$out/tiles.txt")"
timeout --signal TERM --kill-after 40 "$(left)" python3 records/sweep.py "$spec" --out "$out" --base "$@"
say "sweep ended ($?)"
