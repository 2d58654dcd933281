#!/usr/bin/env bash
# One command for everything: see README.md, or ./run_all.sh --help.
set -o pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
usage="usage: ./run_all.sh [smoke|small|full|paper] [SCRIPT ...] [--seeds 0,1,2] [--rows GLOB] [--data DIR|embedded]
                    [--device auto|cpu|cuda] [--set key=value ...] [--results DIR] [--runs DIR] [--force]
                    [--jobs N]     so many papers or seeds side by side, each with its share of the cores (data on disk)
       ./run_all.sh plan [SCALE] [SCRIPT ...] [options]     minutes and memory per row, nothing else
       ./run_all.sh tables [--check] [--results DIR]       render the tables from the records, or compare
       ./run_all.sh test [pytest options]                  the test suite
       ./run_all.sh bench [SCALE]                          speed against the usual ways
Without a scale it takes the largest honest one that machine and data allow, and says which."

fail() { echo "error: $*" >&2; exit 2; }

# The active Python if it satisfies requirements.txt, else .venv, made and filled on first use.
satisfied='
import re, sys
from importlib import metadata
if sys.version_info < (3, 11): sys.exit(1)
for line in open(sys.argv[1]):
    if not line.strip() or line.startswith("#"): continue
    name, relation, wanted = re.match(r"([\w-]+)\s*(==|>=)\s*([\d.]+)", line).groups()
    try: have = metadata.version(name).split("+")[0]
    except metadata.PackageNotFoundError: sys.exit(1)
    number = lambda version: [int(part) for part in re.findall(r"\d+", version)]
    if relation == "==" and have != wanted or relation == ">=" and number(have) < number(wanted): sys.exit(1)
'
usable() { command -v "$1" >/dev/null 2>&1 && "$1" -c "$satisfied" "$here/requirements.txt" 2>/dev/null; }

find_python() {
    for python in "${PYTHON:-python}" python3 "$here/.venv/bin/python"; do
        if usable "$python"; then return; fi
    done
    for base in python3.11 python3.12 python3.13 python3.14 python3; do
        if "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "making .venv and installing requirements.txt (a minute or two)"
            "$base" -m venv "$here/.venv" && "$here/.venv/bin/python" -m pip install --quiet -r "$here/requirements.txt" \
                || fail "the packages of requirements.txt could not be installed into $here/.venv: see the lines above"
            python="$here/.venv/bin/python"
            return
        fi
    done
    fail "Python 3.11 or later is needed"
}

case "${1:-}" in -h|--help|help) echo "$usage"; exit 0 ;; esac
find_python
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}  # threads that spin while they wait are many times slower on a busy machine

case "${1:-}" in
    tables) shift; export PYTHONSAFEPATH=1; exec "$python" -m replicate.report "$@" ;;
    test) shift; cd "$here" || exit 2
        if [ $# -gt 0 ]; then exec "$python" -m pytest -q tests "$@"; fi
        count=$(nproc 2>/dev/null || echo 1); count=$((count > 4 ? 4 : count)); children=()  # each core takes its share of the tests
        trap 'kill "${children[@]}" 2>/dev/null; exit 130' INT TERM  # children in the background do not hear Ctrl-C
        for ((part = 0; part < count; part++)); do
            TESTS_PART=$part/$count "$python" -m pytest -q -p no:cacheprovider tests & children+=($!)
        done
        status=0
        for child in "${children[@]}"; do wait "$child" || status=1; done
        exit $status ;;
    bench) shift; exec "$python" "$here/tests/bench.py" "$@" ;;
esac

# Freed memory is kept for the next step instead of being mapped anew: a tenth less time on a CPU, a tenth more memory (glibc only)
export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_-0} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_-17179869184}
export MALLOC_TOP_PAD_=${MALLOC_TOP_PAD_-67108864}
export PYTHONSAFEPATH=1  # called from a folder with a papers/ of its own, it runs those beside it
plan=()
if [ "${1:-}" = plan ]; then plan=(--plan); shift; fi
scale=; papers=(); options=(); seeds=; data=(); choice=(); jobs=1
while [ $# -gt 0 ]; do
    case "$1" in
        -h|--help) echo "$usage"; exit 0 ;;
        smoke|small|full|paper) scale=$1 ;;
        --scale) [ $# -gt 1 ] || fail "--scale needs a value"; scale=$2; shift ;;
        --scale=*) scale=${1#*=} ;;
        --seeds) [ $# -gt 1 ] || fail "--seeds needs a value"; seeds=$2; shift ;;
        --seeds=*) seeds=${1#*=} ;;
        --jobs) [ $# -gt 1 ] || fail "--jobs needs a value"; jobs=$2; shift ;;
        --jobs=*) jobs=${1#*=} ;;
        --data) [ $# -gt 1 ] || fail "--data needs a value"; data=(--data "$2"); shift ;;
        --data=*) data=(--data "${1#*=}") ;;
        --plan) plan=(--plan) ;;
        --force) options+=("$1") ;;
        --*=*) name=${1%%=*}; value=${1#*=}; shift; set -- "" "$name" "$value" "$@" ;;
        --rows|--device|--set|--results|--runs) [ $# -gt 1 ] || fail "$1 needs a value"; options+=("$1" "$2")
            case "$1 $2" in "--device "*) choice+=("$1" "$2") ;; "--set dataset="*) choice+=(--dataset "${2#dataset=}") ;; esac
            shift ;;
        -*) fail "unknown option '$1'; ./run_all.sh --help lists them" ;;
        *) [ -f "$here/papers/$1.yaml" ] || fail "unknown scale or paper '$1'; scales: smoke, small, full, paper; papers:$(
               for script in "$here"/papers/*.yaml; do printf ' %s' "$(basename "$script" .yaml)"; done)"
           papers+=("$1") ;;
    esac
    shift
done
case "$jobs" in ''|*[!0-9]*|0) fail "--jobs takes a whole number from 1, not '$jobs'" ;; esac
if [ ${#papers[@]} = 0 ]; then
    for script in "$here"/papers/*.yaml; do papers+=("$(basename "$script" .yaml)"); done
fi
if [ -z "$scale" ]; then
    scale=$("$python" -m replicate.trainer "${data[@]}" "${choice[@]}" "${papers[@]}") || exit $?
fi

# Seed 0 of every paper first, then seed 1, ...: stopped at any time, it leaves whole tables behind.
if [ -z "$seeds" ]; then
    case "$scale" in smoke) seeds=0 ;; *) seeds=0,1,2 ;; esac
fi
[ ${#plan[@]} = 0 ] || seeds=${seeds%%,*}
status=0; failed=(); refused=; stopped=; children=(); names=()
trap stopped=1 INT  # the children save their states and end with 130
trap 'stopped=1; [ ${#children[@]} = 0 ] || kill -TERM "${children[@]}" 2>/dev/null' TERM
if [ "$jobs" -gt 1 ]; then
    share=$(($(nproc 2>/dev/null || echo 1) / jobs))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((share > 0 ? share : 1))}
fi

reap() {  # wait until at most $1 children are left, and keep count of how they ended
    while [ ${#children[@]} -gt "$1" ]; do
        for slot in "${!children[@]}"; do
            if [ "$jobs" -gt 1 ] && kill -0 "${children[$slot]}" 2>/dev/null; then continue; fi
            wait "${children[$slot]}"; code=$?
            while kill -0 "${children[$slot]}" 2>/dev/null; do wait "${children[$slot]}"; code=$?; done  # a signal ended the wait early
            if [ $code = 130 ]; then stopped=1; fi
            if [ $code = 2 ]; then refused="$refused ${names[$slot]% (*}"; fi  # wrong input is wrong for every seed
            if [ $code != 0 ] && [ $code != 130 ]; then status=$code; failed+=("${names[$slot]}"); fi
            unset "children[$slot]" "names[$slot]"
        done
        if [ ${#children[@]} -gt "$1" ]; then sleep 0.5 & wait $!; fi
    done
}

for seed in ${seeds//,/ }; do
    for paper in "${papers[@]}"; do
        reap $((jobs - 1))
        if [ -n "$stopped" ]; then break 2; fi
        case " $refused " in *" $paper "*) continue ;; esac
        "$python" -m "papers.$paper" --scale "$scale" --seeds "$seed" "${data[@]}" "${options[@]}" "${plan[@]}" &
        children+=($!); names+=("$paper (seed $seed)")
    done
done
reap 0
if [ -n "$stopped" ]; then exit 130; fi
if [ ${#failed[@]} -gt 0 ]; then echo "not finished: ${failed[*]}" >&2; fi
exit $status
