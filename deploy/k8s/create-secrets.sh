#!/bin/sh
# Prints the secrets of an overlay with new passwords and tokens, for `kubectl create -f -`:
#
#     CSP_API_TOKEN=… sh deploy/k8s/create-secrets.sh dev|prod|prod-tls | kubectl create -f -
#
# prod-tls is for overlays with components/tls. NAMESPACE is sandbox-broker by default. kubectl create refuses secrets
# that exist, so a second run changes no password.
set -eu
overlay=${1:-}
: "${CSP_API_TOKEN:?set it to the token of CSP}"

# Hexadecimal digits, because the passwords are part of URLs.
random() {
    od -An -N24 -tx1 /dev/urandom | tr -d ' \n'
}

# Reads KEY=value lines from the standard input, so that no value appears in the list of processes.
secret() {
    kubectl create secret generic "$1" --type="${2:-Opaque}" --namespace="${NAMESPACE:-sandbox-broker}" \
        --from-env-file=/dev/stdin --dry-run=client --output=yaml
    echo ---
}

case $overlay in
dev)
    postgres=$(random)
    rabbitmq=$(random)
    secret postgres <<EOF
POSTGRES_PASSWORD=$postgres
EOF
    secret rabbitmq <<EOF
RABBITMQ_DEFAULT_PASS=$rabbitmq
EOF
    owner_url=postgresql://sandbox_broker:$postgres@postgres:5432/sandbox_broker
    gateway_url=$owner_url allocator_url=$owner_url
    amqp_url() {
        echo "amqp://sandbox_broker:$rabbitmq@rabbitmq:5672/"
    }
    ;;
prod | prod-tls)
    database=postgres-rw:5432/sandbox_broker scheme=amqp port=5672/ keda_tls=disable
    keda_broker=rabbitmq.sandbox-broker.svc:5672/
    if [ "$overlay" = prod-tls ]; then
        authorities=/etc/sandbox-broker/authorities
        database="$database?sslmode=verify-full&sslrootcert=$authorities/postgres.crt"
        scheme=amqps port="5671/?cafile=$authorities/rabbitmq.crt" keda_tls=enable
        keda_broker=rabbitmq.sandbox-broker.svc:5671/
    fi
    for role in owner gateway allocator; do
        password=$(random)
        user=sandbox_broker
        [ "$role" = owner ] || user=sandbox_broker_$role
        secret "postgres-$role" kubernetes.io/basic-auth <<EOF
username=$user
password=$password
EOF
        eval "${role}_url=\"postgresql://\$user:\$password@\$database\""
    done
    for user in migration gateway allocator reaper csp-syncer provisioner keda; do
        password=$(random)
        secret "rabbitmq-$user" <<EOF
username=$user
password=$password
EOF
        eval "password_of_$(echo "$user" | tr - _)=\$password"
    done
    # Names every node, so that a node that does not answer costs 2 s. The Service could lead to it again and again.
    amqp_url() {
        eval "password=\$password_of_$(echo "$1" | tr - _)"
        urls=
        for node in 0 1 2; do
            urls="$urls${urls:+,}$scheme://$1:$password@rabbitmq-server-$node.rabbitmq-nodes:$port"
        done
        echo "$urls"
    }
    secret keda <<EOF
AMQP_URL=$scheme://keda:$password_of_keda@$keda_broker
TLS=$keda_tls
EOF
    ;;
*)
    echo "usage: CSP_API_TOKEN=… sh deploy/k8s/create-secrets.sh dev|prod|prod-tls" >&2
    exit 2
    ;;
esac

secret gateway <<EOF
DATABASE_URL=$gateway_url
AMQP_URL=$(amqp_url gateway)
BROKER_API_TOKEN=$(random)
BROKER_ADMIN_TOKEN=$(random)
EOF
secret allocator <<EOF
DATABASE_URL=$allocator_url
AMQP_URL=$(amqp_url allocator)
EOF
secret migration <<EOF
DATABASE_URL=$owner_url
AMQP_URL=$(amqp_url migration)
EOF
secret console <<EOF
CONSOLE_SECRET=$(random)
EOF
for service in reaper csp-syncer provisioner; do
    secret $service <<EOF
AMQP_URL=$(amqp_url $service)
CSP_API_TOKEN=$CSP_API_TOKEN
EOF
done
