#!/bin/sh
# Writes a random value for each empty token and password of a .env file, and keeps all other lines. May be repeated.
# With CSP_BASE_URL in the file CSP_API_TOKEN stays as it is, because only CSP can issue a token.
#
#   sh deploy/compose/fill-env.sh [FILE]      FILE is .env by default
set -eu

# Hexadecimal digits, because the passwords are part of URLs.
random() {
    od -An -N24 -tx1 /dev/urandom | tr -d ' \n'
}

file=${1:-.env}
if [ ! -f "$file" ]; then
    echo "There is no $file. Copy .env.example to it first." >&2
    exit 1
fi

real_csp=$(grep -c '^CSP_BASE_URL=.' "$file") || true
# Not readable by other users, from the beginning.
umask 077
new=$(mktemp "$file.XXXXXX")
trap 'rm -f "$new"' EXIT
while IFS= read -r line || [ -n "$line" ]; do
    case $line in
    \#*) ;;
    CSP_API_TOKEN=)
        [ "$real_csp" -gt 0 ] || line=$line$(random)
        ;;
    *_TOKEN= | *_PASSWORD=)
        line=$line$(random)
        ;;
    esac
    printf '%s\n' "$line" >&3
done <"$file" 3>"$new"
mv "$new" "$file"
echo "$file has a value for each token and password"
