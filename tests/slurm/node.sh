#!/usr/bin/env bash
# Start, or start again, node number N of the cluster that cluster.sh is the first process of.
set -euo pipefail
node=node$1 address=10.77.0.$((10 + $1))
if [ ! -e "/run/netns/$node" ]; then
  ip netns add "$node"
  ip link add "veth$1" type veth peer name eth0 netns "$node"
  ip link set "veth$1" master cluster up
  ip -n "$node" addr add "$address/24" dev eth0
  ip -n "$node" link set eth0 up
  ip -n "$node" link set lo up
fi
# Not `ip netns exec`: it mounts /sys anew, and slurmd finds no /sys/fs/cgroup.
nsenter --net="/run/netns/$node" unshare --uts sh -c "hostname $node; exec slurmd -N $node"
