# --- the same for every job from here on ---

set +o errexit +o nounset +o pipefail # whatever the lines above have set: here a failure is a case to be judged

fail() { echo "error: $*" >&2; exit 1; }

# An array's task trains the folder at its place; a job that is no array has one folder, that of task 0.
RUN=
for place in "${!TASKS[@]}"; do
    [ "${TASKS[$place]}" = "${SLURM_ARRAY_TASK_ID:-${TASKS[0]}}" ] && RUN=${RUNS[$place]}
done
[ -n "$RUN" ] || fail "task $SLURM_ARRAY_TASK_ID has no run folder in this script"
# A task's own name: the plain number of an array's last task is that of the whole array.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JOB=${JOB:-$SLURM_JOB_ID}
RESTART=${SLURM_RESTART_COUNT:-0}
NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)

# Left over from an interactive launch, these would give every rank the same place.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT
export PYTHONPATH=$CODE${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

# Judges begin and end of every attempt, and keeps attempts.jsonl; prints one word. Slurm's signals go to every process
# of this script, and what is asked here must be answered all the same.
judge() (trap '' TERM USR1 INT; exec "$PYTHON" -P -m potamos.slurm.attempt "$@")

# Waits while the controller is away, an hour at most: what is asked of it then is not refused, only not heard.
controller() {
    local tries
    for ((tries = 0; tries < 360; tries++)); do
        [[ $(scontrol ping 2>/dev/null) == *UP* ]] && return
        [ "$tries" = 0 ] && echo "$(date -Is) the controller does not answer; waiting for it"
        sleep 10
    done
}

# What Slurm says of this job now. All on one line; empty where the controller does not answer, again and again.
told() {
    local line tries
    for ((tries = 1; tries <= 5; tries++)); do
        line=$(trap '' TERM; scontrol show job "$JOB" -o 2>/dev/null | head -n1)
        [ -n "$line" ] && break
        sleep "$tries"
    done
    echo "$line"
}

# Back into the queue; Slurm ends this script while it waits. A refusal is no failure where Slurm was quicker (a node
# died, a preemption): it says that the job is pending. An answer that was lost on its way (a socket that timed out, a
# controller that starts) is none: it is asked again.
requeue() {
    local answer tries
    for ((tries = 1; tries <= 10; tries++)); do
        controller
        answer=$(trap '' TERM; scontrol requeue "$JOB" 2>&1) && break
        case $answer in
        *pending* | *"already"*) echo "already on its way back into the queue"; break ;;
        *"nvalid job id"* | *disabled* | *denied* | *"not allowed"* | *"batch jobs"*) tries=10 ;;
        *) sleep $((2 * tries)) ;;
        esac
    done
    [ "$tries" -le 10 ] || fail "job $JOB could not be requeued ($answer); go on with: potamos requeue $(printf %q "$RUN")"
    sleep 300
    exit 0
}

# Back into the queue, since nothing can be done on this node: 10 times in a row. The count stands in the job's comment,
# for the run folder may be what is missing. $1: why.
elsewhere() {
    local line count=0
    echo "error: $1" >&2
    line=$(told)
    [[ $line =~ Comment=([0-9]+)-starts-failed-until-restart-([0-9]+) ]] &&
        [ "${BASH_REMATCH[2]}" -eq $((RESTART - 1)) ] && count=${BASH_REMATCH[1]}
    [ "$REQUEUE" = 1 ] || exit 1 # the next job of the chain goes on
    [ "$count" -lt 9 ] || fail "10 starts in a row failed; mend that, then: potamos requeue $(printf %q "$RUN")"
    scontrol update "JobId=$JOB" "Comment=$((count + 1))-starts-failed-until-restart-$RESTART" >&2
    sleep 60
    line=$(told)
    [[ -z $line || $line == *JobState=RUNNING* ]] || exit 1 # cancelled, or requeued by Slurm already
    requeue
}

# Judges how the attempt ended, and does what follows. $1: the status of srun; $2: a reason, where srun has none.
conclude() {
    local verdict tries
    for ((tries = 1; tries <= 5; tries++)); do
        controller
        verdict=$(judge end . --attempt "$ATTEMPT" --status "$1" --why "${2-}" --told "$(told)" --restart "$RESTART" \
            --requeue "$REQUEUE" --crashes "$CRASHES") && break
        verdict=
        sleep $((2 * tries))
    done
    echo "$(date -Is) attempt $ATTEMPT: status $1, ${verdict:-not judged}"
    case $verdict in
    done) exit 0 ;;
    requeue | busy) requeue ;;
    waiting) exit 0 ;; # Slurm has requeued it already, and starts it once this script is gone
    "") elsewhere "how attempt $ATTEMPT ended could not be judged on $(hostname)" ;;
    esac
    # Jobs that were submitted to start after a finished run (afterok) must not start after this one.
    [ "$1" -ne 0 ] && exit "$1"
    exit 1
}

# Runs a command beside the shell and waits until it is really gone: a signal that the shell traps ends `wait` early.
# The tasks have got that signal from Slurm themselves. At the time limit Slurm kills this script with them after a
# while, and nobody would requeue a run whose ranks hang: so they get two thirds of it, and are judged in the rest.
TERMINATED=
CHILD=
terminated() {
    echo "$(date -Is) the batch script was sent SIGTERM"
    [ -z "$TERMINATED" ] || return
    TERMINATED=1
    case $(judge outside . --told "$(told)" --restart "$RESTART") in
    *"time limit"*)
        local patience
        patience=$(scontrol show config 2>/dev/null | sed -n 's/^KillWait *= *\([0-9]*\).*/\1/p')
        (trap '' TERM; sleep $((${patience:-30} * 2 / 3)) && kill -KILL "$CHILD") 2>/dev/null &
        ;;
    esac
}
trap terminated TERM
# $1: a file that gets what the command says on stderr, besides the job's own. Of the command alone, and by a tee that
# Slurm's signals do not end: a shell that writes into a pipe without a reader (bash's "Killed") dies of it.
attend() {
    local status words=$1
    shift
    "$@" 2> >(trap '' TERM USR1 INT; exec tee -a "$words" >&2) &
    CHILD=$!
    while wait "$CHILD"; status=$?; kill -0 "$CHILD" 2>/dev/null; do :; done
    return "$status"
}

# On a bad node the folder is missing, or cannot be written; others may have it.
for ((tries = 1; tries <= 3; tries++)); do
    cd "$RUN" && mkdir -p logs && break
    sleep 20
done
[ "$tries" -le 3 ] || elsewhere "$RUN cannot be entered and written on $(hostname): is it on a file system that the nodes share?"

# A submission that was killed before it could note that it was accepted: what it changed here must not be taken back.
for folder in "${CODE%/code}" .; do [ -d "$folder/.undo" ] && judge accepted "$folder"; done

# Ranks that outlived an earlier start of this job may train here still; until they end, nothing else can.
attend /dev/null "$PYTHON" -P -m potamos.slurm.attempt await . --requeue "$REQUEUE"
for ((tries = 1; tries <= 3; tries++)); do
    ATTEMPT=$(judge begin . --job "$JOB" --restart "$RESTART" --nodes "$SLURM_JOB_NODELIST" --crashes "$CRASHES")
    status=$?
    [ "$status" = 0 ] && break
    [ "$status" = 3 ] && exit 1 # it is of no use to begin, here or elsewhere
    sleep 20
done
[ "$status" = 0 ] || elsewhere "no attempt could begin on $(hostname)"
[ "$ATTEMPT" = done ] && exit 0
[ -f "busy.$ATTEMPT" ] && conclude 1

# The first node by its address, since its name need not resolve on the others; never this host's idea of itself.
head=${NODES%%,*}
for ((tries = 1; tries <= 10; tries++)); do
    controller
    MASTER_ADDR=$(scontrol show node "$head" -o | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    [ -n "$MASTER_ADDR" ] && break
    sleep "$tries"
done
[ -n "$MASTER_ADDR" ] || conclude 1 "node $head has no NodeAddr in 'scontrol show node'; the ranks could not meet"
# A requeued job must not meet what is left of the old one. Below the ports that the system deals to others (32768).
MASTER_PORT=$((20000 + (7 * SLURM_JOB_ID + RESTART) % 12000))
# This script runs on that first node, so a port that answers here is another job's.
while (exec 3<>"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null; do
    MASTER_PORT=$((20000 + (MASTER_PORT - 20000 + 1) % 12000))
done
export MASTER_ADDR MASTER_PORT POTAMOS_ATTEMPT=$ATTEMPT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
echo "$(date -Is) attempt $ATTEMPT of $RUN: job $JOB, restart $RESTART, on $SLURM_JOB_NODELIST, meeting at $MASTER_ADDR:$MASTER_PORT"

# srun does not take a job's --cpus-per-task over by itself.
SRUN=(srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} ${CONTAINER_OPTIONS[@]+"${CONTAINER_OPTIONS[@]}"})

# Submits another job in this one's place, without the nodes $1; its number, or sbatch's last words, in `next`. An answer
# that was lost may have been an acceptance: the comment tells.
follow() {
    local home tries mark=follows-$JOB-attempt-$ATTEMPT
    home=$(dirname "$CODE")
    for ((tries = 1; tries <= 10; tries++)); do
        controller
        # The new job has restarts of its own to count.
        next=$(POTAMOS_EXCLUDE=$1 env -u SLURM_RESTART_COUNT sbatch --parsable --chdir="$home" --exclude="$1" \
            --comment="$mark" ${SLURM_ARRAY_TASK_ID:+"--array=$SLURM_ARRAY_TASK_ID"} "$home/submit.sbatch" 2>"logs/$mark.txt") &&
            return
        next=$(paste -sd" " "logs/$mark.txt")
        echo "$next" >&2
        case $next in
        *nvalid* | *denied* | *disabled* | *violates* | *"not available"* | *"not allowed"*) return 1 ;;
        esac
        sleep $((2 * tries))
        accepted=$(squeue --noheader --format="%A %k" | sed -n "s/^\([0-9]*\) $mark\$/\1/p" | head -n1)
        [ -z "$accepted" ] || { next=$accepted; return; }
    done
    return 1
}

if [ "$PREFLIGHT" = 1 ]; then
    # A node that fails must not end the others' checks, which are waited for a little longer than they take (180 s). What
    # asks the run to stop is no finding about a node.
    attend /dev/null "${SRUN[@]}" --kill-on-bad-exit=0 --wait=600 --ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES" \
        --output="logs/preflight-$ATTEMPT.%n.txt" \
        ${CONTAINER[@]+"${CONTAINER[@]}"} env --block-signal=USR1 --block-signal=TERM \
        "$RANK_PYTHON" -P -m potamos.parallel.node_check --out logs --attempt "$ATTEMPT" --gpus "$GPUS"
    [ -z "$TERMINATED" ] || conclude 143 "asked to stop while the nodes were examined"
    bad=$("$PYTHON" -P -m potamos.parallel.node_check --judge logs --attempt "$ATTEMPT" --nodes "$NODES") ||
        conclude 1 "no node passed the check before training; see logs/preflight-$ATTEMPT.*"
    bad=$(paste -sd, <<<"$bad")
    if [ -n "$bad" ]; then
        # A running job cannot be given other nodes, so another takes its place.
        if [ "$REQUEUE" = 0 ]; then
            judge end . --attempt "$ATTEMPT" --bad-nodes "$bad" >/dev/null
            fail "nodes $bad failed the check; the next job of the chain goes on"
        fi
        all=$bad${EXCLUDE:+,$EXCLUDE}${POTAMOS_EXCLUDE:+,$POTAMOS_EXCLUDE}
        follow "$all" || conclude 1 "nodes $bad failed the check, and no job without them could be submitted ($next)"
        judge end . --attempt "$ATTEMPT" --bad-nodes "$bad" >/dev/null
        judge follow . --job "$next"
        echo "nodes $bad failed the check; job ${next%%;*} goes on without them"
        exit 1 # the run is not finished: what waits for that must not start
    fi
fi

# Signals that come while Python and torch are being imported are held back until train.py's handlers can take them.
attend "logs/attempt-$ATTEMPT.srun.txt" "${SRUN[@]}" --output="logs/attempt-$ATTEMPT.rank-%t.txt" --open-mode=append \
    ${CONTAINER[@]+"${CONTAINER[@]}"} env --block-signal=USR1 --block-signal=TERM \
    "$RANK_PYTHON" -P -m potamos.pretrain.cli train recipe.yaml --run .
conclude $?
