#!/usr/bin/env bash
# Builds, checks and measures the CUDA kernels on a machine with a GPU and no network:
#
#   bench/gpu_check.sh OUT
#
# Needs python3 with torch, timm, pybind11, scikit-build-core, cmake, ninja, pytest and pytest-benchmark, and
# nvcc. Ends within nine minutes: each phase has a limit of its own, and the next one runs whatever came
# of it. OUT gets a log of each kind, benchmarks.jsonl as the benchmarks come, report.json and report.txt,
# whose table is printed last. NPAD_COMMIT names the commit where there is no git to ask.
#
# Exit status: the sum of what is not as it should be. 1 build, 2 tests, 4 memcheck, 8 racecheck,
# 16 synccheck, 32 benchmarks; 64: nothing could be tried. Targets that are missed do not count.
set -uo pipefail

stop() {
    echo "gpu_check: $*" >&2
    exit 64
}

[ $# -eq 1 ] || stop "usage: bench/gpu_check.sh OUT"
mkdir -p "$1" && out=$(cd "$1" && pwd) || stop "$1 cannot be made"
cd "$(dirname "${BASH_SOURCE[0]}")/.." || stop "the checkout is gone"
command -v python3 >/dev/null || stop "python3 is not on PATH"
command -v nvcc >/dev/null || stop "nvcc is not on PATH"
rm -f "$out"/{build,tests,sanitizers,benchmarks}.log "$out"/benchmarks.jsonl "$out"/phases.tsv
arch=$(python3 bench/gpu_report.py machine "$out") || exit 64

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tools=$(python3 -c 'import os, sys; print(os.path.dirname(sys.executable))') # cmake and ninja, perhaps
export PATH=$PATH:$tools:/usr/local/cuda/bin
export CUDAARCHS=$arch PYTHONPATH=$work/site:$PWD/bench PYTHONSAFEPATH=1 NPAD_REQUIRE_CUDA=1
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PYTHONUNBUFFERED=1
export NPAD_CHECK=0 # a kernel that is wrong must not be replaced by the reference here
pytest=(python3 -m pytest -q -ra -p no:cacheprovider -W default)
ops=(embed neighborhood_moments window_covariance pack_factor inverse_cholesky mahalanobis
    centroid_index nearest_centroid farthest_first anomaly_map resize_maps)
deadline=$((SECONDS + 520))
status=0

# phase BIT LIMIT LOG NAME COMMAND...: its limit is also what is left of the nine minutes.
phase() {
    local bit=$1 limit=$2 log=$out/$3.log name=$4 start=$SECONDS verdict=ok code
    shift 4
    [ "$limit" -le $((deadline - SECONDS)) ] || limit=$((deadline - SECONDS))
    if [ "$limit" -lt 10 ]; then
        verdict="no time left"
    else
        echo "== $name, at most $limit s" | tee -a "$log"
        "$@" >>"$log" 2>&1
        code=$?
        case $code in
        0) ;;
        124 | 137) verdict="over $limit s" ;;
        127) verdict="not installed" ;;
        *) verdict="failed ($code)" ;;
        esac
    fi
    [ "$verdict" = ok ] || status=$((status | bit))
    printf '%s\t%s\t%s\n' "$name" "$verdict" $((SECONDS - start)) >>"$out/phases.tsv"
    python3 bench/gpu_report.py report "$out" >"$out/report.txt"
}

within() { timeout -k 5 "$limit" "$@"; }

# A process for each op, since what fails on a GPU takes its process along; all at the same time.
# each_op SELECTION TOOL...: the tests of an op that SELECTION leaves, under a tool.
each_op() {
    local selection=$1 op code=0 one process
    local -A processes
    shift
    for op in "${ops[@]}"; do
        within "$@" "${pytest[@]}" tests/test_cuda.py -k "$op$selection" >"$work/$op.log" 2>&1 &
        processes[$op]=$!
    done
    for op in "${ops[@]}"; do
        process=${processes[$op]}
        wait "$process"
        one=$?
        [ "$one" -eq 0 ] || code=$one
        echo "-- $op: $one"
        cat "$work/$op.log"
    done
    return "$code"
}

sanitize() {
    command -v compute-sanitizer || return 127
    # Memory is not pooled, so that what lies beyond a tensor is nobody's.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 each_op " and test_against_reference and not 384" \
        compute-sanitizer --tool "$1" --kernel-name kns=npad --error-exitcode 9
}

others() {
    local names
    names=$(printf ' or %s' "${ops[@]}")
    within "${pytest[@]}" tests/test_cuda.py tests/test_cuda_detector.py tests/test_check.py -m cuda \
        -k "not (${names# or })"
}

cpu_tests() {
    python3 bench/gpu_report.py runnable tests |
        OMP_NUM_THREADS=2 timeout -k 5 "$limit" xargs -P 8 -n 1 "${pytest[@]}"
}

benchmark() {
    within "${pytest[@]}" -p pytest_benchmark.plugin "bench/bench_$1.py" -k cuda \
        --results "$out/benchmarks.jsonl"
}

phase 1 150 build build within python3 -m pip install --no-build-isolation --no-deps --no-index \
    --disable-pip-version-check -C cmake.define.NPAD_CUDA=ON --target "$work/site" .
phase 2 80 tests "op tests" each_op ""
phase 2 80 tests "other GPU tests" others
phase 4 70 sanitizers memcheck sanitize memcheck
phase 8 70 sanitizers racecheck sanitize racecheck
for op in mahalanobis detector backbone neighborhood_moments nearest_centroid farthest_first embed \
    anomaly_map window_covariance inverse_cholesky pack_factor; do
    phase 32 120 benchmarks "bench $op" benchmark "$op"
done
phase 32 60 benchmarks timeline within python3 bench/timeline.py --device cuda --batch 32
phase 16 50 sanitizers synccheck sanitize synccheck
phase 2 60 tests "2^31 elements" within "${pytest[@]}" tests/test_large_sizes.py -k cuda --slow
phase 2 60 tests "CPU tests" cpu_tests

python3 bench/gpu_report.py left-out tests
cat "$out/report.txt"
exit "$status"
