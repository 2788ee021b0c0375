#!/usr/bin/env bash
# Run examples/digits_ddp.py on two hosts: two network namespaces of this machine, joined by a pair of virtual
# ethernet devices, with an address each and no other way to reach one another.
#
#     tests/distributed/two_hosts.sh [python]
#
# Needs root and iproute2; where the machine does not allow it, says why and ends with 77, "skipped".
set -euo pipefail
cd "$(dirname "$0")/../.."

python=${1:-python}
seconds=300
hosts=("syncbn-$$-a" "syncbn-$$-b")
addresses=(10.213.0.1 10.213.0.2) # inside of these namespaces alone

skip() {
    echo "skipped: $1"
    exit 77
}

clean_up() {
    # shellcheck disable=SC2046
    kill $(jobs -p) 2>/dev/null || true
    wait || true
    for host in "${hosts[@]}"; do
        ip netns delete "$host" 2>/dev/null || true
    done
}

command -v ip >/dev/null || skip "there is no ip command (iproute2)"
trap clean_up EXIT
for host in "${hosts[@]}"; do
    ip netns add "$host" 2>/dev/null || skip "this user may not add network namespaces"
done
ip link add veth0 netns "${hosts[0]}" type veth peer name veth0 netns "${hosts[1]}" 2>/dev/null ||
    skip "this machine has no virtual ethernet devices"

for node in 0 1; do
    inside=(ip netns exec "${hosts[$node]}")
    "${inside[@]}" ip address add "${addresses[$node]}/24" dev veth0
    "${inside[@]}" ip link set veth0 up
    "${inside[@]}" ip link set lo up
done

for node in 0 1; do
    OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=veth0 timeout "$seconds" ip netns exec "${hosts[$node]}" \
        "$python" -m torch.distributed.run --nnodes 2 --nproc-per-node 1 --node-rank "$node" \
        --master-addr "${addresses[0]}" --master-port 29400 \
        tests/without_shutdown.py examples/digits_ddp.py --epochs 1 &
    runs[node]=$!
done
for node in 0 1; do
    wait "${runs[$node]}"
done
echo "two hosts: done"
