#!/bin/sh
# Release the student's sandbox, which the broker then deletes, on images without Python. Version of
# instruqt_broker_cleanup.py in POSIX sh, with the same files, environment and exit codes. Requires curl, awk, and the
# basic commands of coreutils or busybox.
#
# Environment: BROKER_API_TOKEN, INSTRUQT_PARTICIPANT_ID, BROKER_API_URL, BROKER_TIMEOUT_SEC (120), BROKER_OUTPUT_DIR,
# CLEANUP_STRICT (false: exit code 0 in every case). Exit code: 0 done or nothing to do, 1 refused or no response,
# 2 misconfigured.
set -u

SCRIPT=instruqt_broker_cleanup
RELEASE_FIELDS="sandbox_id status"

# End the script: code 1 for a refusal or no response, code 2 for a mistake in the track's setup.
fail() { # CODE MESSAGE
    print_line "ERROR: $2" >&2
    [ "$strict" = true ] || exit 0
    exit "$1"
}

find_advice() {
    case $status in
    400) advice="Check INSTRUQT_PARTICIPANT_ID and the content of $SANDBOX_FILE." ;;
    401) advice="Check BROKER_API_TOKEN in the track's secrets. The broker rejects it. It may have been replaced." ;;
    403) advice="Check that INSTRUQT_PARTICIPANT_ID is that of the student who received this sandbox." ;;
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

strict=true
trim "${CLEANUP_STRICT:-}"
case $trimmed in
[Ff][Aa][Ll][Ss][Ee] | [Nn][Oo] | 0) strict=false ;;
'' | [Tt][Rr][Uu][Ee] | [Yy][Ee][Ss] | 1) ;;
*) fail 2 "CLEANUP_STRICT is neither true nor false. Correct it." ;;
esac
find_directory
read_sandbox_id
if [ -z "$sandbox_id" ]; then
    print_line "nothing to clean up: $SANDBOX_FILE is missing or empty"
    exit 0
fi
command -v curl >/dev/null 2>&1 || fail 2 "curl is not installed. Install it, or use $SCRIPT.py."
read_token
read_api_url
read_time_budget
find_holders
make_work_directory
read_secret
wait_cs=0
wait_sec=0
more_headers=
content=
required=$RELEASE_FIELDS
build_sandbox_url mark-for-deletion
print_line "releasing sandbox $sandbox_id at $api_url"
send_for_holders
if has_field detail.code && [ "$(cat "$work/detail.code")" = SANDBOX_NOT_FOUND ]; then
    print_line "nothing to clean up: the broker has no record of sandbox $sandbox_id"
elif ! is_success; then
    fail_refused
else
    # The files stay, because later hooks may read them and a second release succeeds too.
    read_field status
    print_line "released sandbox $sandbox_id (status $value). The broker deletes it."
fi
