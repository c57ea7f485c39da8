#!/bin/sh
# Writes a random value for each empty token and password of a .env file and keeps all other lines. Idempotent. If the
# file sets CSP_BASE_URL, CSP_API_TOKEN stays empty, because only CSP can issue a token.
#
#   sh deploy/compose/fill-env.sh [FILE]      FILE is .env by default
set -eu

# Hexadecimal digits, because the passwords are part of URLs.
random() {
    od -An -N24 -tx1 /dev/urandom | tr -d ' \n'
}

file=${1:-.env}
if [ ! -f "$file" ]; then
    echo "$file does not exist. Copy .env.example to $file first." >&2
    exit 1
fi

real_csp=$(grep -c '^CSP_BASE_URL=.' "$file") || true
# Created without read access for other users.
umask 077
new=$(mktemp "$file.XXXXXX")
trap 'rm -f "$new"' EXIT
while IFS= read -r line || [ -n "$line" ]; do
    case $line in
    \#*) ;;
    CSP_API_TOKEN=)
        [ "$real_csp" -gt 0 ] || line=$line$(random)
        ;;
    # The tokens of OpenID Connect are optional, and an operator issues them.
    CONSOLE_*_TOKEN=) ;;
    *_TOKEN= | *_PASSWORD= | CONSOLE_SECRET=)
        line=$line$(random)
        ;;
    esac
    printf '%s\n' "$line" >&3
done <"$file" 3>"$new"
mv "$new" "$file"
echo "Every token and password in $file is set."
