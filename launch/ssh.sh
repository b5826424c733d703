#!/bin/bash
# One process a host through plain ssh, run again on each host by `kdjax supervise`:
#   HOSTS="node1 node2" launch/ssh.sh --config=distill/coco_folder:mkd --workdir=/shared/mkd
# The first host coordinates: PORT must be free there, and reachable from the others and from nobody else. Each host has
# kdjax in the PATH of commands that ssh runs. SIGTERM or Ctrl-C here stops all hosts after a save.
# Docs: docs/several_hosts.md
# shellcheck disable=SC2029,SC2329  # names are meant to be filled in here; `stop` is called by the trap
set -u

read -r -a hosts <<<"${HOSTS:?set it to the names of the hosts, separated by spaces}"
coordinator=${COORDINATOR:-${hosts[0]}:${PORT:-8476}}
name=kdjax-$$-$RANDOM # of the files that hold the numbers of the processes, in the home folder of each host

pids=()
for index in "${!hosts[@]}"; do
  train=(kdjax supervise -- kdjax train --multihost "--coordinator=$coordinator" "--hosts=${#hosts[@]}" "--host=$index" "$@")
  printf -v command '%q ' "${train[@]}"
  ssh "${hosts[index]}" "echo \$\$ >~/.$name-$index && exec $command" </dev/null &
  pids+=($!)
done

# ssh hands no signals on.
stop() {
  for index in "${!hosts[@]}"; do
    ssh "${hosts[index]}" "kill -TERM \$(cat ~/.$name-$index)" </dev/null
  done
}
trap stop TERM INT

code=0
for index in "${!hosts[@]}"; do
  while kill -0 "${pids[index]}" 2>/dev/null; do # a signal ends `wait` early
    wait "${pids[index]}"
  done
  wait "${pids[index]}"
  this=$?
  ssh "${hosts[index]}" "rm -f ~/.$name-$index" </dev/null
  [ "$this" -gt "$code" ] && code=$this
done
exit "$code"
