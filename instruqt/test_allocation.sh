#!/usr/bin/env bash
# Test the broker from a track's point of view: allocate a sandbox for a made-up student, show the files, repeat the
# request (it must return the same sandbox) and print the command that releases the sandbox.
#
# Usage: BROKER_API_TOKEN=... [BROKER_API_URL=...] [SANDBOX_NAME_PREFIX=...] ./test_allocation.sh
# Writes the files into the current directory. Exit code: 0 success, otherwise the failed step prints the reason.
set -euo pipefail

scripts="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
export INSTRUQT_PARTICIPANT_ID="${INSTRUQT_PARTICIPANT_ID:-test-student-$(date +%s)-$$}"
export INSTRUQT_TRACK_SLUG="${INSTRUQT_TRACK_SLUG:-test-allocation}"

echo "== 1. Allocate a sandbox for ${INSTRUQT_PARTICIPANT_ID}"
python3 "${scripts}/instruqt_broker_allocation.py"
first_id="$(<sandbox_id.txt)"

echo
echo "== 2. The files"
for file in sandbox_id.txt external_id.txt sandbox_name.txt sandbox_env.sh; do
    printf '%-17s %s\n' "${file}" "$(<"${file}")"
done

echo
echo "== 3. Allocate again: it must return the same sandbox"
python3 "${scripts}/instruqt_broker_allocation.py"
second_id="$(<sandbox_id.txt)"

echo
echo "== 4. To release the sandbox, run with the same BROKER_API_TOKEN:"
cleanup_command=(env "INSTRUQT_PARTICIPANT_ID=${INSTRUQT_PARTICIPANT_ID}")
if [[ -n "${BROKER_API_URL:-}" ]]; then
    cleanup_command+=("BROKER_API_URL=${BROKER_API_URL}")
fi
cleanup_command+=(python3 "${scripts}/instruqt_broker_cleanup.py")
printf 'cd %q &&' "${PWD}"
printf ' %q' "${cleanup_command[@]}"
echo

echo
if [[ "${first_id}" != "${second_id}" ]]; then
    echo "FAILED: the same student got sandbox ${first_id}, then ${second_id}" >&2
    exit 1
fi
echo "OK: sandbox ${first_id} both times"
