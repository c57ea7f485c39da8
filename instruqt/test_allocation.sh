#!/usr/bin/env bash
# Tries the broker as a track would: allocates a sandbox for a made-up student, shows the files, asks again
# (which must give the same sandbox) and prints the command that hands the sandbox back.
#
# Usage: BROKER_API_TOKEN=... [BROKER_API_URL=...] [SANDBOX_NAME_PREFIX=...] ./test_allocation.sh
# The files appear in the current directory. Exit code: 0 works, otherwise the step that failed says why.
set -euo pipefail

scripts="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
export INSTRUQT_PARTICIPANT_ID="${INSTRUQT_PARTICIPANT_ID:-test-student-$(date +%s)-$$}"
export INSTRUQT_TRACK_SLUG="${INSTRUQT_TRACK_SLUG:-test-allocation}"

echo "== 1. Allocate a sandbox for ${INSTRUQT_PARTICIPANT_ID}"
python3 "${scripts}/instruqt_broker_allocation.py"
first="$(<sandbox_id.txt)"

echo
echo "== 2. The files"
for file in sandbox_id.txt external_id.txt sandbox_name.txt sandbox_env.sh; do
    printf '%-17s %s\n' "${file}" "$(<"${file}")"
done

echo
echo "== 3. Ask again: it must be the same sandbox"
python3 "${scripts}/instruqt_broker_allocation.py"
second="$(<sandbox_id.txt)"

echo
echo "== 4. To hand the sandbox back, with the same BROKER_API_TOKEN:"
clean_up=(env "INSTRUQT_PARTICIPANT_ID=${INSTRUQT_PARTICIPANT_ID}")
if [[ -n "${BROKER_API_URL:-}" ]]; then
    clean_up+=("BROKER_API_URL=${BROKER_API_URL}")
fi
clean_up+=(python3 "${scripts}/instruqt_broker_cleanup.py")
printf 'cd %q &&' "${PWD}"
printf ' %q' "${clean_up[@]}"
echo

echo
if [[ "${first}" != "${second}" ]]; then
    echo "FAILED: the same student was given sandbox ${first}, then ${second}" >&2
    exit 1
fi
echo "OK: sandbox ${first} both times"
