#!/bin/sh
# Allocate a sandbox from the broker's pool for the student of this lab, on images without Python. Version of
# instruqt_broker_allocation.py in POSIX sh, with the same files, options, environment and exit codes. Requires curl,
# awk, and the basic commands of coreutils or busybox.
#
#   sh instruqt_broker_allocation.sh                   setup: allocate a sandbox
#   sh instruqt_broker_allocation.sh --standby         setup with hot start: allocate it before a student exists
#   sh instruqt_broker_allocation.sh --claim           start the time of a standby lease for the student
#   sh instruqt_broker_allocation.sh --extend HOURS    extend the lease
#   sh instruqt_broker_allocation.sh --replace REASON  get another sandbox for a broken one
#   ... --access                                         also get a login inside the sandbox, and wait for it
#
# Environment: BROKER_API_TOKEN, INSTRUQT_PARTICIPANT_ID, INSTRUQT_TRACK_SLUG, SANDBOX_NAME_PREFIX, BROKER_API_URL,
# BROKER_TIMEOUT_SEC (120), BROKER_WAIT_SEC (900), BROKER_ACCESS_SEC (600), BROKER_OUTPUT_DIR. Exit code: 0 done, 1 refused or no response,
# 2 misconfigured.
set -u

SCRIPT=instruqt_broker_allocation
DEFAULT_WAIT_SEC=900
DEFAULT_ACCESS_SEC=600
ACCESS_PROGRESS_CS=1500
ACCOUNT_FILE=external_id.txt
NAME_FILE=sandbox_name.txt
SHELL_FILE=sandbox_env.sh
EMAIL_FILE=user_email.txt
PASSWORD_FILE=user_password.txt
USER_ID_FILE=user_id.txt
CREDENTIALS_FILE=user_credentials.sh
LEASE_FIELDS="sandbox_id external_id name"
EXTENSION_FIELDS="expires_at max_expires_at"
MAX_REASON=500

# End the script: code 1 for a refusal or no response, code 2 for a mistake in the track's setup.
fail() { # CODE MESSAGE
    print_line "ERROR: $2" >&2
    make_printable "$2"
    run_tool fail-message "$printable"
    exit "$1"
}

# Run a command of Instruqt if the host has it. Raw images have none. Its failure is no failure of the lab.
run_tool() { # COMMAND ARGUMENT…
    command -v "$1" >/dev/null 2>&1 || return 0
    tool=$1
    if command -v timeout >/dev/null 2>&1; then set -- timeout 10 "$@"; fi
    "$@" >/dev/null 2>&1 || print_line "$tool failed, and the script goes on"
}

find_advice() {
    case $status in
    400) advice="Check INSTRUQT_PARTICIPANT_ID, INSTRUQT_TRACK_SLUG, SANDBOX_NAME_PREFIX and the arguments." ;;
    401) advice="Check BROKER_API_TOKEN in the track's secrets. The broker rejects it. It may have been replaced." ;;
    403) advice="Check that BROKER_API_TOKEN is the token for tracks, and that the files belong to this student." ;;
    404) advice="Check BROKER_API_URL, and that the broker's version supports this command." ;;
    409) advice="Start the lab again when other students have finished, or ask the broker's operator for more \
sandboxes. If SANDBOX_NAME_PREFIX is set, only sandboxes whose names start with it count." ;;
    *) advice="Check BROKER_API_URL." ;;
    esac
}

# --- Shared lines: identical in both scripts, because each script works alone. A test compares them. ---

DEFAULT_API_URL=https://api-sandbox-broker.highvelocitynetworking.com/v1
DEFAULT_TIMEOUT_SEC=120
REQUEST_TIMEOUT_CS=1000 # the broker itself responds within 5 s
BACKOFF_CS=50           # first pause
MAX_BACKOFF_CS=1000
MAX_PAUSE_CS=8640000
LINE_PAUSE_CS=500
MAX_LINE_PAUSE_CS=2000 # a student loses the place in the waiting line after 60 s without a request
SANDBOX_FILE=sandbox_id.txt
HOLDER_FILE=holder_id.txt
SECRET_FILE=lease_secret.txt
method=POST

# Times are whole centiseconds (…_cs), because the arithmetic of a shell has no fractions. Functions return values in
# variables, because `fail` ends the script only outside a command substitution.

LC_ALL=C
export LC_ALL

token=
work=
trap '[ -z "$work" ] || rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

# Return a text as one line of printable ASCII in $printable, with the token masked in case a server echoed it.
make_printable() {
    printable=
    rest=$1
    if [ -n "$token" ]; then
        while :; do
            case $rest in
            *"$token"*)
                printable="$printable${rest%%"$token"*}***"
                rest=${rest#*"$token"}
                ;;
            *) break ;;
            esac
        done
    fi
    printable=$(printf '%s' "$printable$rest" | tr -cs ' -~' '?')
}

print_line() {
    make_printable "$1"
    printf 'sandbox broker: %s\n' "$printable"
}

# Return $1 without surrounding blanks and line ends in $trimmed.
trim() {
    trimmed=${1#"${1%%[![:space:]]*}"}
    trimmed=${trimmed%"${trimmed##*[![:space:]]}"}
}

# Return the value of a variable for a header in $value. With advice ($3), the variable is required.
read_header_value() { # NAME VALUE [ADVICE]
    trim "$2"
    value=$trimmed
    if [ -z "$value" ] && [ -n "${3:-}" ]; then
        fail 2 "$1 environment variable not set. $3"
    fi
    case $value in
    *[!\ -~]*) fail 2 "$1 has characters that are invalid in an HTTP header. Use plain ASCII on one line." ;;
    esac
}

read_token() {
    read_header_value BROKER_API_TOKEN "${BROKER_API_TOKEN:-}" \
        "Add it to the track's secrets. The broker's operator has it."
    token=$value
}

# Return the student id of Instruqt in $participant. With `required`, it must be set.
read_participant_id() { # [required]
    advice=
    [ "${1:-}" != required ] || advice="Instruqt sets it in lifecycle scripts only."
    read_header_value INSTRUQT_PARTICIPANT_ID "${INSTRUQT_PARTICIPANT_ID:-}" "$advice"
    participant=$value
}

# Return the API's base URL without a trailing slash in $api_url. BROKER_API_URL may omit the /v1.
read_api_url() {
    trim "${BROKER_API_URL:-}"
    api_url=${trimmed:-$DEFAULT_API_URL}
    address='^https?://([[:alnum:]_.-]+|\[[[:alnum:]_:.]+\])(:[0-9]{1,5})?(/[[:alnum:]_./~%-]*)?$'
    case $api_url in *[!!-~]*) api_url= ;; esac
    if ! printf '%s\n' "$api_url" | grep -Eqi "$address"; then
        fail 2 "BROKER_API_URL is not a web address. Example: https://broker.example.com/v1"
    fi
    while case $api_url in */) true ;; *) false ;; esac do
        api_url=${api_url%/}
    done
    case $api_url in */v1) ;; *) api_url=$api_url/v1 ;; esac
}

# Return a number of seconds as centiseconds in $cs. `minimum_cs` is the smallest valid value.
read_seconds() { # NAME VALUE DEFAULT MINIMUM_CS
    trim "$2"
    seconds=${trimmed:-$3}
    cs=-1
    case ${seconds%%.*} in
    ??????????*) ;; # larger numbers would overflow
    *) case $seconds in
        '' | . | *[!0-9.]* | *.*.*) ;;
        *) to_cs "$seconds" ;;
        esac ;;
    esac
    if [ "$cs" -lt "$4" ]; then
        fail 2 "$1 is not a number of seconds. Example: $3"
    fi
}

# Return a decimal number of seconds as centiseconds in $cs.
to_cs() {
    whole=${1%%.*}
    whole=${whole#"${whole%%[!0]*}"} # leading zeros would make the number octal
    fraction=00
    case $1 in *.*) fraction=$(printf '%.2s' "${1#*.}00") ;; esac
    cs=$((${whole:-0} * 100 + 1$fraction - 100))
}

# Print centiseconds as decimal seconds.
format_cs() {
    printf '%d.%02d' $(($1 / 100)) $(($1 % 100))
}

# Print centiseconds as seconds for a message.
describe_cs() {
    printf '%d.%d' $(($1 / 100)) $(($1 % 100 / 10))
}

read_time_budget() {
    read_seconds BROKER_TIMEOUT_SEC "${BROKER_TIMEOUT_SEC:-}" "$DEFAULT_TIMEOUT_SEC" 1
    budget_cs=$cs
    budget_sec=$seconds
}

# Return the directory of the files in $directory: BROKER_OUTPUT_DIR, or else the working directory.
find_directory() {
    trim "${BROKER_OUTPUT_DIR:-}"
    directory=$trimmed
    case $directory in
    '') ;;
    /*) return 0 ;;
    *)
        directory=$(pwd -P)/$directory
        return 0
        ;;
    esac
    directory=$(pwd -P 2>/dev/null)
    if [ ! -d "$directory" ]; then # a shell still knows the path of a deleted directory
        fail 2 "cannot write the working directory: it does not exist. Run this in a writable directory."
    fi
}

make_work_directory() {
    if ! work=$(mktemp -d 2>&1); then
        reason=$work
        work=
        fail 2 "cannot create a temporary directory: $reason. Set TMPDIR to a writable directory."
    fi
}

# Return the first line of a file in $sandbox_id, without blanks; "" without a file.
read_sandbox_id() {
    sandbox_id=
    path=$directory/$SANDBOX_FILE
    [ -e "$path" ] || return 0
    if [ -d "$path" ] || ! sandbox_id=$(cat "$path" 2>/dev/null); then
        fail 2 "cannot read $SANDBOX_FILE. Run this where the allocation script ran."
    fi
    trim "$sandbox_id"
    sandbox_id=$(printf '%.1000s' "$trimmed")
}

# Return the id under which a standby lease was taken in $kept; "" without one.
read_kept_holder() {
    kept=$(cat "$directory/$HOLDER_FILE" 2>/dev/null)
    trim "$kept"
    kept=$(printf '%.1000s' "$trimmed")
    case $kept in *[!\ -~]*) kept= ;; esac
}

# Return the secret of the lease in $secret; "" without one. The broker changes a lease only for its secret.
read_secret() {
    secret=
    path=$directory/$SECRET_FILE
    [ -e "$path" ] || return 0
    if ! secret=$(cat "$path" 2>/dev/null); then
        fail 2 "cannot read $SECRET_FILE. Run this as the user who allocated the sandbox."
    fi
    trim "$secret"
    secret=$trimmed
    case $secret in *[!\ -~]*) secret= ;; esac
    if [ "${#secret}" -lt 16 ] || [ "${#secret}" -gt 128 ]; then secret=; fi
}

# Return the student ids under which the sandbox of the files may be leased in $holder and $other_holder.
find_holders() {
    read_kept_holder
    if [ -n "$kept" ]; then read_participant_id; else read_participant_id required; fi
    holder=$participant
    other_holder=$kept
    [ -n "$holder" ] || holder=$kept
    [ "$holder" != "$kept" ] || other_holder=
}

# Return the URL of a sandbox in $url. Only characters that need it are encoded, because the broker refuses others.
build_sandbox_url() { # ACTION
    id=$sandbox_id
    case $id in
    *[!A-Za-z0-9._~-]*)
        id=$(printf '%s' "$id" | od -An -v -tx1 | tr -s ' ' '\n' | awk '
            NF {
                code = 16 * (index("123456789abcdef", substr($1, 1, 1))) + index("123456789abcdef", substr($1, 2, 1))
                character = sprintf("%c", code)
                printf "%s", character ~ /[A-Za-z0-9._~-]/ ? character : "%" toupper($1)
            }')
        ;;
    esac
    url=$api_url/sandboxes/$id/$1
}

# Return a random number below 2^16 in $random.
draw() {
    random=$(od -An -N2 -tu2 /dev/urandom 2>/dev/null | tr -d ' ')
    random=${random:-$$}
}

# Return a random id in $new_id.
draw_id() {
    new_id=$(od -An -v -N16 -tx1 /dev/urandom 2>/dev/null | tr -d ' \n')
    if [ -z "$new_id" ]; then
        fail 2 "this host has no /dev/urandom or no od. Use instruqt_broker_allocation.py."
    fi
}

# Return a time in $now_cs. The uptime is no subject to changes of the clock.
read_clock() {
    if read -r uptime _ 2>/dev/null </proc/uptime; then
        now_cs=$((${uptime%.*} * 100 + 1${uptime#*.} - 100))
    else
        now_cs=$(date +%s)00
    fi
}

pause() { # CENTISECONDS
    [ "$1" -gt 0 ] || return 0
    sleep "$(format_cs "$1")" 2>/dev/null || sleep $(($1 / 100 + 1))
}

# Print a text as a quoted value of curl's configuration.
quote_for_curl() {
    printf '"%s"' "$(printf '%s' "$1" | sed 's/[\\"]/\\&/g')"
}

# Send one request by $method. Returns the HTTP status in $status (0: no response, with the reason in $failure). The fields of the
# response are files in $work: see parse_response.
post_once() { # TIMEOUT_CS
    rm -f "$work"/*
    set -- "$1" -q --silent --show-error --globoff --path-as-is --request "$method" --config - \
        --user-agent "$SCRIPT/1.1 sh" --dump-header "$work/headers" --output "$work/body" --write-out '%{http_code}'
    host=${url#*://}
    host=${host%%/*}
    case $host in
    localhost | localhost:* | 127.0.0.1 | 127.0.0.1:* | \[::1\]*) set -- "$@" --noproxy '*' ;;
    esac
    timeout=$(format_cs "$1")
    shift
    failure=
    # The token is no argument, because every user can read the arguments of a process.
    if status=$(
        {
            printf 'url = %s\n' "$(quote_for_curl "$url")"
            printf 'header = %s\n' "$(quote_for_curl "Authorization: Bearer $token")"
            printf 'header = %s\n' "$(quote_for_curl "X-Instruqt-Sandbox-ID: $holder")"
            [ -z "$secret" ] || printf 'header = %s\n' "$(quote_for_curl "X-Lease-Secret: $secret")"
            printf 'header = "Content-Type: application/json"\n'
            [ -z "$prefer" ] || printf 'header = %s\n' "$(quote_for_curl "Prefer: $prefer")"
            printf '%s\n' "$more_headers" | while IFS= read -r line; do
                [ -z "$line" ] || printf 'header = %s\n' "$(quote_for_curl "$line")"
            done
            [ "$method" = GET ] || printf 'data = %s\n' "$(quote_for_curl "$content")"
        } | curl "$@" --max-time "$timeout" 2>"$work/problem"
    ); then
        parse_response
    else
        status=0
        failure=$(cat "$work/problem" 2>/dev/null)
        failure=${failure:-curl failed}
        rm -f "$work/headers" "$work/body"
    fi
    return 0
}

# Write each known field of the response into a file of its name in $work: of the headers `location` and
# `header_retry_cs` (Retry-After), of the body the fields in `texts` and `numbers`. A field of another type, a blank text, and every
# field of a body that is no complete JSON object is missing.
parse_response() {
    [ -s "$work/headers" ] && awk -v work="$work" -v now="$(date +%s)" '
        /^HTTP\// { retry_after = ""; location = "" } # the last header block counts, because a proxy sends one, too
        { sub(/\r$/, "") }
        tolower($0) ~ /^retry-after:/ { retry_after = $0; sub(/^[^:]*:[ \t]*/, "", retry_after) }
        tolower($0) ~ /^location:/ { location = $0; sub(/^[^:]*:[ \t]*/, "", location) }
        function to_seconds(date, parts, clock, month, year) { # for example Sun, 06 Nov 1994 08:49:37 GMT
            if (split(date, parts, /[ ,]+/) != 6 || split(parts[5], clock, ":") != 3) return -1
            month = (index("JanFebMarAprMayJunJulAugSepOctNovDec", parts[3]) + 2) / 3
            if (month != int(month) || month < 1 || parts[2] !~ /^[0-9]+$/ || parts[2] + 0 > 31) return -1
            year = parts[4] - (month < 3)
            month = month < 3 ? month + 9 : month - 3
            return 86400 * (365 * year + int(year / 4) - int(year / 100) + int(year / 400) \
                + int((153 * month + 2) / 5) + parts[2] - 719469) + 3600 * clock[1] + 60 * clock[2] + clock[3]
        }
        END {
            if (location != "") printf "%s", location > (work "/location")
            if (retry_after == "") exit
            seconds = 0
            if (retry_after ~ /^[0-9]+([.][0-9]*)?$/) seconds = retry_after + 0
            else if (retry_after ~ /^[A-Z]/) seconds = to_seconds(retry_after) - now
            if (seconds < 0) seconds = 0
            if (seconds > 86400) seconds = 86400
            printf "%d", seconds * 100 > (work "/header_retry_cs")
        }' "$work/headers"
    [ -s "$work/body" ] && awk -v work="$work" \
        -v texts=" sandbox_id external_id name status email password user_id login_url reason \
detail.code detail.message detail.request_id " \
        -v numbers=" position estimated_wait_sec expires_at max_expires_at retry_after detail.retry_after " '
        { text = text (NR > 1 ? "\n" : "") $0 }
        function hex(digits, i, result) {
            result = 0
            for (i = 1; i <= 4; i++) result = 16 * result + index("123456789abcdef", tolower(substr(digits, i, 1)))
            return result
        }
        function encode(code) { # in UTF-8
            if (code < 128) return sprintf("%c", code)
            if (code < 2048) return sprintf("%c%c", 192 + int(code / 64), 128 + code % 64)
            if (code < 65536)
                return sprintf("%c%c%c", 224 + int(code / 4096), 128 + int(code / 64) % 64, 128 + code % 64)
            return sprintf("%c%c%c%c", 240 + int(code / 262144), 128 + int(code / 4096) % 64, \
                128 + int(code / 64) % 64, 128 + code % 64)
        }
        function decode(raw, result, i, c, code, low) { # sets `unusable` for NUL and halves of surrogate pairs
            if (index(raw, "\\") == 0) return raw
            result = ""
            for (i = 1; i <= length(raw); i++) {
                c = substr(raw, i, 1)
                if (c != "\\") { result = result c; continue }
                c = substr(raw, ++i, 1)
                if (c != "u") { result = result (c in escapes ? escapes[c] : c); continue }
                code = hex(substr(raw, i + 1, 4))
                i += 4
                if (code >= 55296 && code < 56320 && substr(raw, i + 1, 2) == "\\u") {
                    low = hex(substr(raw, i + 3, 4))
                    if (low >= 56320 && low < 57344) {
                        code = 65536 + (code - 55296) * 1024 + low - 56320
                        i += 6
                    }
                }
                if (code == 0 || code >= 55296 && code < 57344) { unusable = 1; return "" }
                result = result encode(code)
            }
            return result
        }
        function store(value, names, field) { # of the object itself, or of an object in it
            if (depth > 2 || kind[depth] != "{" || kind[1] != "{") return
            field = depth == 1 ? key[1] : key[1] "." key[2]
            if (index(names, " " field " ")) found[field] = value
        }
        END {
            escapes["n"] = "\n"; escapes["t"] = "\t"; escapes["r"] = "\r"; escapes["b"] = "\b"; escapes["f"] = "\f"
            for (i = 1; i <= length(text); i++) {
                c = substr(text, i, 1)
                if (c == "{" || c == "[") { kind[++depth] = c; in_key[depth] = c == "{" }
                else if (c == "}" || c == "]") { if (--depth == 0) { complete = 1; break } }
                else if (c == ":") in_key[depth] = 0
                else if (c == ",") in_key[depth] = kind[depth] == "{"
                else if (c == "\"") {
                    start = i + 1
                    while (++i <= length(text) && (c = substr(text, i, 1)) != "\"") if (c == "\\") i++
                    unusable = 0
                    value = decode(substr(text, start, i - start))
                    if (in_key[depth]) key[depth] = value
                    else if (!unusable && value ~ /[^ \t\r\n]/) store(value, texts)
                } else if (c ~ /[-0-9]/) {
                    match(substr(text, i), /^-?[0-9]+([.][0-9]+)?([eE][-+]?[0-9]+)?/)
                    if (RLENGTH > 0) {
                        store(sprintf("%.2f", substr(text, i, RLENGTH)), numbers)
                        i += RLENGTH - 1
                    }
                }
            }
            if (!complete || text !~ /^[ \t\r\n]*[{]/) exit
            for (field in found) printf "%s", found[field] > (work "/" field)
        }' "$work/body"
    return 0
}

has_field() {
    [ -f "$work/$1" ]
}

# Return a field of the response in $value, "" if it is missing. A text keeps its line ends.
read_field() {
    value=
    if has_field "$1"; then
        value=$(cat "$work/$1" && echo .)
        value=${value%.}
    fi
}

# Return a number of the response, without its fraction, in $value.
read_number() {
    read_field "$1"
    value=${value%%.*}
}

is_success() {
    case $status in 2??) true ;; *) false ;; esac
}

is_place_in_line() {
    [ "$status" = 202 ] && has_field status && [ "$(cat "$work/status")" = waiting ]
}

# Return true if a retry cannot help: after a complete success or a refusal by the broker itself. A 403 without the
# broker's JSON comes from a WAF, a 404 from an ingress that restarts. Both pass. $required names the fields of a
# complete success.
is_final() {
    case $status in
    2??)
        for field in $required; do
            has_field "$field" || return 1
        done
        ;;
    403 | 404) has_field detail.code ;;
    0 | 408 | 429 | 5??) return 1 ;;
    esac
}

# Return a description of the response in $response.
describe_response() {
    if [ "$status" = 0 ]; then
        response="no response ($failure)"
    elif has_field detail.code; then
        read_field detail.message
        response="$status $(cat "$work/detail.code"): $value"
        read_field detail.request_id
        response="$response [request ${value:-unknown}]"
    elif has_field location; then
        response="HTTP $status, a redirect to $(cat "$work/location") that is not followed"
    else
        response="HTTP $status without the broker's JSON (did a WAF, proxy or load balancer answer?)"
    fi
}

# Return the pause that the server requests in $cs, 0 without one: Retry-After, else `retry_after` in the body.
read_retry_after() {
    cs=0
    read_field header_retry_cs
    if [ -n "$value" ]; then
        cs=$value
        return 0
    fi
    read_field detail.retry_after
    [ -n "$value" ] || read_field retry_after
    case $value in
    '' | *[!0-9.]*) ;;
    ????????*) cs=$MAX_PAUSE_CS ;;
    *) to_cs "$value" ;;
    esac
    [ "$cs" -le "$MAX_PAUSE_CS" ] || cs=$MAX_PAUSE_CS
}

# Send the request until its response is final. Ends the script when the time is used up.
#
# Attempts without a response of the broker use up $budget_cs. With $wait_cs above 0, the student may wait that long
# in line. Each place in line starts the budget again.
send() {
    read_clock
    deadline_cs=$((now_cs + budget_cs))
    line_end_cs=$((now_cs + wait_cs))
    backoff_cs=$BACKOFF_CS
    attempt=1
    place=
    while :; do
        read_clock
        left_cs=$((deadline_cs - now_cs))
        [ "$left_cs" -ge 5 ] || left_cs=5
        [ "$left_cs" -le "$REQUEST_TIMEOUT_CS" ] || left_cs=$REQUEST_TIMEOUT_CS
        prefer=
        if [ "$wait_cs" -gt 0 ] && [ "$line_end_cs" -gt "$now_cs" ]; then
            # RFC 7240. A broker without a waiting line ignores the header.
            prefer="respond-async, wait=$(((line_end_cs - now_cs + 99) / 100))"
        fi
        post_once "$left_cs"
        if is_place_in_line; then
            wait_in_line
            continue
        fi
        is_final && return 0
        read_retry_after
        draw
        pause_cs=$((cs + backoff_cs * (50 + random % 51) / 100))
        read_clock
        left_cs=$((deadline_cs - now_cs))
        describe_response
        if [ $((pause_cs + 5)) -gt "$left_cs" ]; then
            fail 1 "gave up at attempt $attempt: $response. The next attempt would be in $(describe_cs "$pause_cs") s, \
past the $budget_sec s of BROKER_TIMEOUT_SEC. It is safe to run this again. If it keeps failing, check \
BROKER_API_URL and that this machine reaches $url, or contact the broker's operator."
        fi
        print_line "attempt $attempt: $response. Trying again in $(describe_cs "$pause_cs") s, for $((left_cs / 100)) s at most."
        pause "$pause_cs"
        backoff_cs=$((backoff_cs * 2))
        [ "$backoff_cs" -le "$MAX_BACKOFF_CS" ] || backoff_cs=$MAX_BACKOFF_CS
        attempt=$((attempt + 1))
    done
}

# Keep the place in the waiting line: pause until the next request. Ends the script at the end of $wait_cs.
wait_in_line() {
    read_number position
    if [ "$value" != "$place" ]; then
        place=$value
        read_number estimated_wait_sec
        estimate="The wait is not known yet."
        [ -z "$value" ] || estimate="The estimated wait is $value s."
        print_line "no sandbox is free; waiting in line at position $place. $estimate"
    fi
    read_clock
    left_cs=$((line_end_cs - now_cs))
    if [ "$left_cs" -le 0 ]; then
        fail 1 "no sandbox became free in the $wait_sec s of BROKER_WAIT_SEC; the last position in line was $place. \
Start the lab again later, or ask the broker's operator for more sandboxes."
    fi
    read_retry_after
    [ "$cs" -gt 0 ] || cs=$LINE_PAUSE_CS
    [ "$cs" -le "$MAX_LINE_PAUSE_CS" ] || cs=$MAX_LINE_PAUSE_CS
    draw
    cs=$((cs * (90 + random % 11) / 100))
    [ "$cs" -le "$left_cs" ] || cs=$left_cs
    pause "$cs"
    read_clock
    deadline_cs=$((now_cs + budget_cs))
    backoff_cs=$BACKOFF_CS
    attempt=1
}

# Send the request under $holder, then under $other_holder if the broker does not know the sandbox under the first. A
# claim can give a standby lease to another id than it was taken under, and either id may be the present one.
send_for_holders() {
    send
    if [ -n "$other_holder" ] && has_field detail.code && [ "$(cat "$work/detail.code")" = NOT_SANDBOX_OWNER ]; then
        holder=$other_holder
        send
    fi
}

# End the script after a refusal. `advice` is defined in each script.
fail_refused() {
    describe_response
    find_advice
    fail 1 "$response. $advice"
}

# --- End of the shared lines. ---

# Add a header to the request if the variable is set.
add_header() { # HEADER NAME VALUE
    read_header_value "$2" "$3"
    [ -z "$value" ] || more_headers="$more_headers$1: $value
"
}

# Create the directory of the files. Ends the script if it or a file of an earlier run is not writable, before the
# allocation, because the cleanup could not release a sandbox without a record of it.
check_directory() {
    if ! { mkdir -p "$directory" && probe=$(mktemp "$directory/.broker.XXXXXX") && rm -f "$probe"; } 2>"$work/problem"; then
        fail 2 "cannot write $directory: $(cat "$work/problem"). Run this in a writable directory."
    fi
    for name in "$SANDBOX_FILE" "$ACCOUNT_FILE" "$NAME_FILE" "$SHELL_FILE" "$SECRET_FILE"; do
        path=$directory/$name
        find_obstacle
        [ -z "$obstacle" ] || fail 2 "cannot replace $path: $obstacle. Remove it or use another directory."
    done
}

# Return the reason in $obstacle why the file $path cannot be replaced, "" if it can or does not exist.
find_obstacle() {
    obstacle=
    if [ -d "$path" ]; then
        obstacle="it is a directory"
    elif [ -e "$path" ] && is_sticky "$directory"; then
        # In a sticky directory, for example /tmp, only root and the owner of the file or the directory can replace it.
        # shellcheck disable=SC2012 # POSIX has no other way to see an owner
        obstacle=$(ls -ldn "$directory/." "$path" | awk -v user="$(id -u)" '
            user == 0 || user == $3 { found = 1 }
            END { if (!found) print "it belongs to another user, and the directory is sticky" }')
    fi
}

is_sticky() {
    # shellcheck disable=SC2012 # POSIX has no other way to see the sticky bit
    case $(ls -ld "$1/." | awk '{ print $1 }') in *[tT] | *[tT].) true ;; *) false ;; esac
}

# Write files atomically: all are on disk under temporary names before the first is renamed. The content of the file
# NAME is in $work/new-NAME. $file_mode is 644, so that hooks of other users can read them, or 600 for secrets.
write_files() { # NAME…
    for name in "$@"; do
        if ! (umask 077 && set -C && cat "$work/new-$name" >"$directory/.$name.$$" \
            && chmod "$file_mode" "$directory/.$name.$$") \
            2>"$work/problem"; then
            remove_staged "$@"
            fail 2 "cannot write $directory: $(cat "$work/problem"). Run this in a writable directory."
        fi
    done
    for name in "$@"; do
        if ! mv -f "$directory/.$name.$$" "$directory/$name" 2>"$work/problem"; then
            remove_staged "$@"
            fail 2 "cannot write $directory/$name: $(cat "$work/problem"). Run this in a writable directory."
        fi
    done
}

remove_staged() { # NAME…
    for name in "$@"; do
        rm -f "$directory/.$name.$$"
    done
}

# Return $1 quoted for a shell in $quoted.
quote() {
    case $1 in
    *[!A-Za-z0-9@%+=:,./_-]*)
        quoted=$(printf '%s' "$1" | sed "s/'/'\"'\"'/g" && echo .)
        quoted=\'${quoted%.}\'
        ;;
    *) quoted=$1 ;;
    esac
}

# Write the files of a lease, and set the variables of Instruqt's agent.
keep_lease() { # OUTCOME
    earlier_id=$(cat "$directory/$SANDBOX_FILE" 2>/dev/null)
    trim "$earlier_id"
    earlier_id=$(printf '%.1000s' "$trimmed")
    read_field sandbox_id && new_sandbox_id=$value
    read_field external_id && account_id=$value
    read_field name && sandbox_name=$value
    exports="export"
    for variable in "STUDENT_TENANT=$sandbox_name" "CSP_ACCOUNT_ID=$account_id" "SANDBOX_ID=$new_sandbox_id"; do
        quote "${variable#*=}"
        exports="$exports ${variable%%=*}=$quoted"
    done
    printf '%s' "$new_sandbox_id" >"$work/new-$SANDBOX_FILE"
    printf '%s' "$account_id" >"$work/new-$ACCOUNT_FILE"
    printf '%s' "$sandbox_name" >"$work/new-$NAME_FILE"
    printf '%s\n' "$exports" >"$work/new-$SHELL_FILE"
    write_files "$SANDBOX_FILE" "$ACCOUNT_FILE" "$NAME_FILE" "$SHELL_FILE" # the first is the one the cleanup needs
    print_line "$1 sandbox $sandbox_name (id $new_sandbox_id, account $account_id)"
    if [ -n "$earlier_id" ] && [ "$earlier_id" != "$new_sandbox_id" ]; then
        print_line "THIS IS ANOTHER SANDBOX THAN BEFORE. The files named sandbox $earlier_id, which this student does \
not hold. Work done in that sandbox is not in this one."
    fi
    print_line "the files are in $directory"
    run_tool agent variable set STUDENT_TENANT "$sandbox_name"
    run_tool agent variable set CSP_ACCOUNT_ID "$account_id"
    run_tool agent variable set SANDBOX_ID "$new_sandbox_id"
}

# Return the student id for a standby lease in $holder: the participant, else the sandbox of Instruqt, else a new id.
# With hot start, Instruqt runs the setup before a participant exists. The id is kept for --claim and the cleanup.
find_standby_holder() {
    read_participant_id
    holder=$participant
    [ -z "$holder" ] || return 0
    read_header_value INSTRUQT__SANDBOX_ID "${INSTRUQT__SANDBOX_ID:-}"
    holder=$value
    read_header_value _SANDBOX_ID "${_SANDBOX_ID:-}"
    [ -n "$holder" ] || holder=$value
    read_kept_holder
    [ -n "$holder" ] || holder=$kept
    if [ -z "$holder" ]; then
        draw_id
        holder=standby-$new_id
    fi
    printf '%s' "$holder" >"$work/new-$HOLDER_FILE"
    write_files "$HOLDER_FILE"
}

# Return the secret for the lease in $secret, and keep it for the other commands and the cleanup, readable for this
# user only. The file exists before the first request, so a repeated request has the same secret.
create_secret() {
    read_secret
    [ -z "$secret" ] || return 0
    draw_id
    secret=$new_id
    draw_id
    if ! (umask 077 && set -C && printf '%s' "$secret$new_id" >"$directory/.$SECRET_FILE.$$" \
        && mv -f "$directory/.$SECRET_FILE.$$" "$directory/$SECRET_FILE") 2>"$work/problem"; then
        rm -f "$directory/.$SECRET_FILE.$$"
        fail 2 "cannot write $directory/$SECRET_FILE: $(cat "$work/problem"). Run this in a writable directory."
    fi
    read_secret
}

require_sandbox_id() {
    read_sandbox_id
    [ -n "$sandbox_id" ] || fail 2 "$SANDBOX_FILE is missing or empty in $directory. Allocate a sandbox first, in the \
same directory."
}

allocate() {
    add_header X-Instruqt-Track-ID INSTRUQT_TRACK_SLUG "${INSTRUQT_TRACK_SLUG:-}"
    add_header X-Sandbox-Name-Prefix SANDBOX_NAME_PREFIX "${SANDBOX_NAME_PREFIX:-}"
    [ -z "$access" ] || more_headers="${more_headers}X-Sandbox-Access: user
"
    if [ "$action" = standby ]; then
        check_directory
        find_standby_holder
        more_headers="${more_headers}X-Lease-Mode: standby"
    else
        read_participant_id required
        holder=$participant
        check_directory
    fi
    create_secret
    url=$api_url/allocate
    required=$LEASE_FIELDS
    print_line "requesting a sandbox from $api_url"
    send
    is_success || fail_refused
    if [ "$status" = 201 ]; then keep_lease allocated; else keep_lease "this student already holds"; fi
}

claim() {
    require_sandbox_id
    find_holders
    if [ -n "$kept" ]; then
        holder=$kept
        [ -z "$participant" ] || [ "$participant" = "$kept" ] || more_headers="X-New-Holder: $participant"
    fi
    check_directory
    build_sandbox_url claim
    required=$LEASE_FIELDS
    wait_cs=0
    print_line "claiming sandbox $sandbox_id at $api_url"
    send
    is_success || fail_refused
    keep_lease claimed
}

extend() {
    require_sandbox_id
    find_holders
    draw_id
    more_headers="Idempotency-Key: $new_id" # a repeated request extends once
    build_sandbox_url extend
    content="{\"hours\": $hours}"
    required=$EXTENSION_FIELDS
    wait_cs=0
    print_line "extending the lease of sandbox $sandbox_id by $hours h at $api_url"
    send_for_holders
    is_success || fail_refused
    format_time expires_at
    expires_at=$formatted
    format_time max_expires_at
    print_line "the lease of sandbox $sandbox_id ends at $expires_at. Extensions are possible until $formatted."
}

# Return a time of the response as text in $formatted.
format_time() { # FIELD
    read_number "$1"
    formatted=$(date -u -d "@$value" '+%Y-%m-%d %H:%M:%S UTC' 2>/dev/null) || formatted="Unix time $value"
}

replace() {
    require_sandbox_id
    find_holders
    check_directory
    build_sandbox_url replace
    content="{\"reason\": \"$(printf '%s' "$reason" | tr '\001-\037\177' ' ' | sed 's/[\\"]/\\&/g')\"}"
    required=$LEASE_FIELDS
    print_line "replacing sandbox $sandbox_id at $api_url"
    send_for_holders
    is_success || fail_refused
    keep_lease allocated
}

# Wait for the login inside the sandbox, and write its files. Ends the script if the broker cannot create it, or the
# time is over.
fetch_login() {
    read_sandbox_id
    find_holders
    build_sandbox_url access
    method=GET
    more_headers=
    wait_cs=0
    required=status
    print_line "waiting for the login inside sandbox $sandbox_id; a new sandbox needs some minutes"
    read_clock
    access_began_cs=$now_cs
    told_cs=$now_cs
    while :; do
        send_for_holders
        is_success || fail_access
        case $(cat "$work/status") in
        ready) break ;;
        failed)
            read_field reason
            fail 1 "there is no login inside the sandbox yet: $value Run this again later."
            ;;
        esac
        read_clock
        waited_cs=$((now_cs - access_began_cs))
        left_cs=$((access_cs - waited_cs))
        if [ "$left_cs" -le 0 ]; then
            fail 1 "the login was not ready after the $access_sec s of BROKER_ACCESS_SEC. Run this again later, or ask \
the broker's operator."
        fi
        if [ $((now_cs - told_cs)) -ge "$ACCESS_PROGRESS_CS" ]; then
            told_cs=$now_cs
            print_line "the login is not ready after $((waited_cs / 100)) s; waiting $((left_cs / 100)) s more at most"
        fi
        read_retry_after
        [ "$cs" -gt 0 ] || cs=$LINE_PAUSE_CS
        [ "$cs" -le "$MAX_LINE_PAUSE_CS" ] || cs=$MAX_LINE_PAUSE_CS
        [ "$cs" -le "$left_cs" ] || cs=$left_cs
        pause "$cs"
    done
    write_login
}

fail_access() {
    describe_response
    case $status in
    404) advice="The sandbox was allocated without a login. Release it, and allocate it with --access." ;;
    410) advice="Allocate a sandbox first." ;;
    *) find_advice ;;
    esac
    fail 1 "$response. $advice"
}

# Write the files of the login in the response. Only this user can read them, because they hold the password.
write_login() {
    exports="export"
    for field in email password user_id login_url; do
        read_field "$field"
        [ -n "$value" ] || fail 1 "the broker returned a login without $field. Run this again later."
        quote "$value"
        case $field in
        email) new_email=$value exports="$exports CSP_USER_EMAIL=$quoted" ;;
        password) new_password=$value exports="$exports CSP_USER_PASSWORD=$quoted" ;;
        user_id) new_user_id=$value exports="$exports CSP_USER_ID=$quoted" ;;
        login_url) login_url=$value exports="$exports CSP_LOGIN_URL=$quoted" ;;
        esac
    done
    printf '%s' "$new_email" >"$work/new-$EMAIL_FILE"
    printf '%s' "$new_password" >"$work/new-$PASSWORD_FILE"
    printf '%s' "$new_user_id" >"$work/new-$USER_ID_FILE"
    printf '%s\n' "$exports" >"$work/new-$CREDENTIALS_FILE"
    file_mode=600
    write_files "$EMAIL_FILE" "$PASSWORD_FILE" "$USER_ID_FILE" "$CREDENTIALS_FILE"
    print_line "the student signs in at $login_url as $new_email; the password is in $PASSWORD_FILE"
}

fail_usage() {
    fail 2 "wrong arguments. Usage: sh $SCRIPT.sh [--standby | --claim | --extend HOURS | --replace REASON] [--access]"
}

# Return the arguments of the action in $action and its variables, and --access, which may stand first or last.
parse_arguments() {
    action=allocate
    access=
    last=
    [ $# -eq 0 ] || eval "last=\${$#}"
    if [ "${1:-}" = --access ]; then
        access=yes
        shift
    elif [ "$last" = --access ]; then
        access=yes
        case $# in
        2) set -- "$1" ;;
        3) set -- "$1" "$2" ;;
        *) fail_usage ;;
        esac
    fi
    case ${1:-} in
    --standby | --claim)
        [ $# -eq 1 ] || fail_usage
        action=${1#--}
        ;;
    --extend)
        [ $# -eq 2 ] || fail_usage
        action=extend
        parse_hours "$2"
        ;;
    --replace)
        [ $# -eq 2 ] || fail_usage
        action=replace
        trim "$2"
        reason=$trimmed
        if [ -z "$reason" ] || [ "${#reason}" -gt "$MAX_REASON" ]; then fail_usage; fi
        ;;
    *) [ $# -eq 0 ] || fail_usage ;;
    esac
}

# Return a decimal number above 0 in $hours, as JSON requires it.
parse_hours() {
    hours=$1
    case $hours in '' | . | *[!0-9.]* | *.*.*) fail_usage ;; esac
    case $hours in *[1-9]*) ;; *) fail_usage ;; esac
    whole=${hours%%.*}
    whole=${whole#"${whole%%[!0]*}"}
    fraction=
    case $hours in *.?*) fraction=.${hours#*.} ;; esac
    hours=${whole:-0}$fraction
}

parse_arguments "$@"
command -v curl >/dev/null 2>&1 || fail 2 "curl is not installed. Install it, or use $SCRIPT.py."
read_token
read_api_url
read_time_budget
read_seconds BROKER_WAIT_SEC "${BROKER_WAIT_SEC:-}" "$DEFAULT_WAIT_SEC" 0
wait_cs=$cs
wait_sec=$seconds
read_seconds BROKER_ACCESS_SEC "${BROKER_ACCESS_SEC:-}" "$DEFAULT_ACCESS_SEC" 0
access_cs=$cs
access_sec=$seconds
file_mode=644
find_directory
make_work_directory
read_secret
more_headers=
content=
other_holder=
case $action in
claim) claim ;;
extend) extend ;;
replace) replace ;;
*) allocate ;;
esac
[ -z "$access" ] || fetch_login
