#!/usr/bin/env bash
# The first process of a Slurm cluster in namespaces of its own (cluster.py makes them): everything that
# is mounted, named or started here is gone when it ends, and nothing of it is seen from outside.
#
#     cluster.sh STATE NODES CPUS GPUS MEMORY
#
# STATE is an empty directory; STATE/ready appears when every node is idle. A node is a slurmd in a
# network and UTS namespace of its own: `localhost` on one is not `localhost` on another.
set -euo pipefail
state=$1 nodes=$2 cpus=$3 gpus=$4 memory=$5
here=$(dirname "$(readlink -f "$0")")
network=10.77.0
trap 'echo "cluster.sh: line $LINENO failed" >&2' ERR

wait_for() { # SECONDS COMMAND...
  local tenths=$(($1 * 10))
  shift
  for ((i = 0; i < tenths; i++)); do
    if "$@" >/dev/null 2>&1; then return 0; fi
    sleep 0.1
  done
  echo "cluster.sh: waited too long for: $*" >&2
  return 1
}

start_node() { # NUMBER
  local node=node$1
  ip netns add "$node"
  ip link add "veth$1" type veth peer name eth0 netns "$node"
  ip link set "veth$1" master cluster up
  ip -n "$node" addr add "$network.$((10 + $1))/24" dev eth0
  ip -n "$node" link set eth0 up
  ip -n "$node" link set lo up
  # Not `ip netns exec`: it mounts /sys anew, and slurmd finds no /sys/fs/cgroup.
  nsenter --net="/run/netns/$node" unshare --uts sh -c "hostname $node; exec slurmd -N $node"
}

# Files of our own where Slurm looks. Not $SLURM_CONF: Snakemake's job step takes SLURM_* away.
mkdir -p "$state"/{etc,slurmctld,spool,dev,mysql}
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mkdir -p /etc/slurm /run/munge /run/mysqld /run/netns
mount --bind "$state/etc" /etc/slurm
{
  echo "127.0.0.1 localhost"
  echo "$network.1 login"
  for ((n = 1; n <= nodes; n++)); do echo "$network.$((10 + n)) node$n"; done
} >"$state/hosts"
mount --bind "$state/hosts" /etc/hosts
# An unknown name fails at once instead of waiting for a server that no node reaches.
echo "nameserver 127.0.0.1" >"$state/resolv.conf"
mount --bind "$state/resolv.conf" /etc/resolv.conf
hostname login

ip link set lo up
ip link add cluster type bridge
ip addr add "$network.1/24" dev cluster
ip link set cluster up

sed "s|@STATE@|$state|; s|@LOGIN@|$network.1|" "$here/slurm.conf" >/etc/slurm/slurm.conf
for ((n = 1; n <= nodes; n++)); do
  echo "NodeName=node$n NodeAddr=$network.$((10 + n)) CPUs=$cpus CoresPerSocket=$cpus" \
    "RealMemory=$memory Gres=gpu:h100:$gpus State=UNKNOWN" >>/etc/slurm/slurm.conf
done
# A GPU is a device that is there and does nothing; where none may be made, a file.
for ((g = 0; g < gpus; g++)); do
  mknod "$state/dev/nvidia$g" c 1 3 2>/dev/null || touch "$state/dev/nvidia$g"
done
echo "Name=gpu Type=h100 File=$state/dev/nvidia[0-$((gpus - 1))]" >/etc/slurm/gres.conf
cat >/etc/slurm/slurmdbd.conf <<CONF
AuthType=auth/munge
DbdHost=localhost
SlurmUser=root
LogFile=$state/slurmdbd.log
PidFile=/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
CONF
chmod 600 /etc/slurm/slurmdbd.conf

chown munge:munge /run/munge
[ -e /etc/munge/munge.key ] || runuser -u munge -- mungekey --create
runuser -u munge -- munged --log-file="/run/munge/munged.log"

socket=/run/mysqld/mysqld.sock
chown mysql:mysql /run/mysqld "$state/mysql"
mariadb-install-db --no-defaults --user=mysql --datadir="$state/mysql" --skip-test-db \
  >"$state/mariadb.log" 2>&1
mariadbd --no-defaults --user=mysql --datadir="$state/mysql" --socket=$socket --skip-networking \
  --innodb-buffer-pool-size=64M --innodb-lock-wait-timeout=900 >>"$state/mariadb.log" 2>&1 &
wait_for 120 mariadb -S $socket -e "select 1"
mariadb -S $socket -e "create user slurm@localhost identified by 'slurm';
  grant all on slurm_acct_db.* to slurm@localhost"
wait_for 20 munge -n
slurmdbd
wait_for 120 sacctmgr -n list cluster
sacctmgr -i add cluster test
sacctmgr -i add account lab Description=lab Organization=lab
sacctmgr -i add user root Account=lab DefaultAccount=lab
sacctmgr -i add qos urgent Preempt=normal Priority=10
sacctmgr -i modify user root set QOS+=urgent

slurmctld
wait_for 60 scontrol ping
for ((n = 1; n <= nodes; n++)); do start_node "$n"; done

all_idle() { [ "$(sinfo -h -N -t idle -o %N | sort -u | wc -l)" = "$nodes" ]; }
wait_for 120 all_idle
touch "$state/ready"
# As the first process it has to collect those whose parent is gone; ignoring SIGCHLD does.
exec python3 -c "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN); signal.pause()"
