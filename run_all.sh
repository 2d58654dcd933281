#!/usr/bin/env bash
# One command for everything: see README.md, or ./run_all.sh --help.
[ -n "$BASH_VERSION" ] || exec bash "$0" "$@"  # called as `sh run_all.sh`
set -o pipefail
trap 'exit 130' INT TERM  # once what is running has ended, such as a Python that ignores it
unset CDPATH  # with which cd prints
self=$(realpath "${BASH_SOURCE[0]}" 2>/dev/null) || self=${BASH_SOURCE[0]}  # it may be a link
here=$(cd "$(dirname "$self")" && pwd)
export PYTHONSAFEPATH=1  # called from a folder with a papers/ or types.py of its own, it takes none
known=  # a script and its YAML make a paper
for script in "$here"/papers/*.py; do
    [ ! -e "${script%.py}.yaml" ] || known+="$(basename "$script" .py) "
done
usage="usage: ./run_all.sh [smoke|demo|small|full|paper] [SCRIPT ...] [--seeds 0,1,2] [--rows GLOB]
           [--data DIR] [--device auto|cpu|cuda] [--set key=value ...] [--results DIR] [--runs DIR]
           [--force] [--quiet] [--jobs N: so many papers or seeds side by side; demo: all cores]
       ./run_all.sh plan [SCALE] [SCRIPT ...] [options]   what would run: rows, minutes, memory
       ./run_all.sh tables [--check] [--results DIR]      render the pages, or compare them
       ./run_all.sh test [pytest options]                 the test suite
       ./run_all.sh bench [SCALE] [SCRIPT ...] [--results DIR]   speed against the usual ways
Scripts: $known
Without a scale it takes full where a CUDA GPU and the data are there, else demo, and says why.
Results go to out/, checkpoints to runs/; results/ is the reference they are compared with."
fail() { echo "error: $*" >&2; exit 2; }
case "${1:-}" in -h|--help|help) echo "$usage"; exit 0 ;; esac
env pwd -P &>/dev/null || fail "the folder that you are in is gone: cd to another"

# The active Python if it satisfies requirements.txt, else .venv, made and filled on first use.
needs=$here/requirements.txt
recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
lacking='
import re, sys
from importlib import metadata
def version(name):
    try:
        return (metadata.version(name) or "none").split("+")[0]
    except metadata.PackageNotFoundError:
        return "none"
def numbers(text):
    return [int(number) for number in re.findall("[0-9]+", text)]
for line in open(sys.argv[1]):
    name, sign, wanted = re.fullmatch("([a-z]+)(==|>=)([0-9.]+)", line.strip()).groups()
    found = version(name)
    if found != wanted and (sign == "==" or numbers(found) < numbers(wanted)):
        print(f"{name}{sign}{wanted} (there: {found})", end="  ")'
usable() { recent "$1" && why=$("$1" -c "$lacking" "$needs" 2>/dev/null) && [ -z "$why" ]; }
why=
for python in "${PYTHON:-python}" python3 "$here/.venv/bin/python" ""; do
    usable "$python" && break
done
if [ -z "$python" ]; then
    for base in python3 python3.{11,12,13,14} ""; do recent "$base" && break; done
    [ -n "$base" ] || fail "Python 3.11 or later is needed"
    [ -z "$why" ] || echo "python3 lacks $why"
    echo "making .venv and installing requirements.txt (a minute or two)"
    python="$here/.venv/bin/python"
    "$base" -m venv "$here/.venv" && "$python" -m pip install -q -r "$needs" \
        || fail "the packages of $needs could not be installed into $here/.venv: see above"
fi
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}  # spinning threads slow others down
cores=$(nproc 2>/dev/null || echo 1); children=(); names=(); stopped=; plan=()
case "${1:-}" in
    tables) shift; exec "$python" -m replicate.report "$@" ;;
    test) shift; cd "$here" || exit 2
        unset PYTHONSAFEPATH
        [ $# = 0 ] || exec "$python" -m pytest -q tests "$@"
        count=$((cores > 4 ? 4 : cores)); status=0  # each core takes its share of the tests
        trap 'kill "${children[@]}" 2>/dev/null; exit 130' INT TERM
        for ((part = 0; part < count; part++)); do
            TESTS_PART=$part/$count "$python" -m pytest -q -p no:cacheprovider tests &
            children+=($!)
        done
        for child in "${children[@]}"; do wait "$child" || status=1; done
        exit $status ;;
    plan) shift; plan=(--plan) ;;
esac

# glibc keeps freed memory for the next step: a tenth less time on a CPU, a tenth more memory
export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_-0} MALLOC_TOP_PAD_=${MALLOC_TOP_PAD_-67108864}
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_-17179869184}
[ "${1:-}" != bench ] || { shift; exec "$python" "$here/tests/bench.py" "$@"; }
terminal() { (trap '' INT; exec "$python" -m replicate.terminal "$@"); }  # Ctrl-C waits for it
scale=; papers=(); options=(); seeds=(); jobs=; help=; own=
while [ $# -gt 0 ]; do
    word=$1
    case "$word" in
        --force|--plan|--quiet|--help|--*=*) ;;
        --seeds|--jobs|--scale|--rows|--data|--device|--set|--results|--runs)
            [ $# -gt 1 ] || fail "$word takes a value"; shift; word=$word=$1 ;;
    esac
    case "$word" in
        -h|--help) help=1 ;;
        --plan) plan=(--plan) ;;
        --seeds=*) seeds=("$word") ;;
        --jobs=*) jobs=${word#*=}; jobs=${jobs:-none} ;;
        --scale=*) scale=${word#*=} ;;
        --force|--quiet|--rows=*|--data=*|--device=*|--set=*|--results=*|--runs=*)
            options+=("$word") ;;
        -*) options+=("$word"); own=${own:-${word%%=*}} ;;  # a script's own, or unknown
        smoke|demo|small|full|paper) scale=$word ;;
        *) if [[ " $known" == *" $word "* ]]; then
               [[ " ${papers[*]} " == *" $word "* ]] || papers+=("$word")
           else
               [ -n "$own" ] || fail "unknown scale or paper '$word'; scales: smoke, demo, small," \
                   "full, paper; papers: $known"
               options+=("$word")  # a value of a script's own option
           fi ;;
    esac
    shift
done
if [ -n "$help" ]; then
    [ ${#papers[@]} = 1 ] || { echo "$usage"; exit 0; }
    exec "$python" -m "papers.${papers[0]}" --help
fi
if [ -n "$own" ]; then
    [ ${#papers[@]} = 1 ] || fail "unknown option '$own': see ./run_all.sh --help; a script's own" \
        "wants its name, too"
    exec "$python" -m "papers.${papers[0]}" ${scale:+--scale "$scale"} "${seeds[@]}" \
        "${options[@]}" "${plan[@]}"
fi
[[ $jobs =~ ^([1-9][0-9]{0,2})?$ ]] || fail "--jobs takes a whole number from 1 to 999, not '$jobs'"
[ ${#papers[@]} -gt 0 ] || read -ra papers <<<"$known"
if [ -z "$scale" ]; then
    chosen=$(terminal scale "${papers[@]}" "${options[@]}") || exit $?
    read -r scale rest <<<"$chosen"  # a paper without that scale is passed over
    read -ra papers <<<"$rest"
fi
turns=()  # "paper seed": seed 0 of every paper first, since it always leaves whole tables
chosen=$(terminal turns "$scale" "${papers[@]}" "${seeds[@]}" "${options[@]}" "${plan[@]}") \
    || exit $?
while read -r turn; do turns+=("$turn"); done <<<"$chosen"
work="${turns[*]}"
if [ ${#plan[@]} -gt 0 ]; then  # of one seed each
    turns=("${turns[@]:0:${#papers[@]}}")
    echo "Plan of scale $scale, timed here:"
fi
if [ -z "$jobs" ]; then  # demo's small networks gain little from threads
    jobs=1
    [ "$scale" != demo ] || [ ${#plan[@]} -gt 0 ] || [ -e /dev/nvidiactl ] \
        || jobs=$((cores < 4 ? cores : 4))
    [ "$jobs" -le ${#turns[@]} ] || jobs=${#turns[@]}
fi
share=$((cores / jobs > 0 ? cores / jobs : 1))
[ "$jobs" = 1 ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$share} REPLICATE_PLAIN=1
REPLICATE_LEDGER=$(mktemp 2>/dev/null) \
    || fail "no file can be made in ${TMPDIR:-/tmp}: make room, or set TMPDIR to another folder"
export REPLICATE_LEDGER  # every run notes here what it was, for the summary at the end
trap 'rm -f "$REPLICATE_LEDGER"' EXIT
# The children save their states and end with 130; they do not hear Ctrl-C while they load.
trap 'stopped=1; [ ${#children[@]} = 0 ] || kill -TERM "${children[@]}" 2>/dev/null' INT TERM

status=0; failed=(); refused=
alive() { kill -0 "${children[$1]}" 2>/dev/null; }
reap() {  # wait until at most $1 children are left, and keep count of how they ended
    while [ ${#children[@]} -gt "$1" ]; do
        for slot in "${!children[@]}"; do
            if [ "$jobs" -gt 1 ] && alive "$slot"; then continue; fi
            wait "${children[$slot]}"; code=$?
            while alive "$slot"; do wait "${children[$slot]}"; code=$?; done
            case $code in
                0) ;;
                130) stopped=1 ;;
                *) status=$code; failed+=("${names[$slot]}") ;;
            esac
            [ $code != 2 ] || refused="$refused ${names[$slot]% (*}"  # wrong for every seed
            unset "children[$slot]" "names[$slot]"
        done
        if [ ${#children[@]} -gt "$1" ]; then sleep 0.5 & wait $!; fi
    done
}
number=0
for turn in "${turns[@]}"; do
    read -r paper seed <<<"$turn"
    [ ${#turns[@]} = 1 ] || export REPLICATE_TURN="run $((++number)) of ${#turns[@]}: "
    reap $((jobs - 1))
    [ -z "$stopped" ] || break
    case " $refused " in *" $paper "*) continue ;; esac
    "$python" -m "papers.$paper" --scale "$scale" --seeds "$seed" "${options[@]}" "${plan[@]}" &
    children+=($!); names+=("$paper (seed $seed)")
done
reap 0
[ -z "$stopped" ] || exit 130
terminal end "$REPLICATE_LEDGER" --turns "$work" "${plan[@]}"
[ ${#failed[@]} = 0 ] || echo "not finished: ${failed[*]}" >&2
exit $status
