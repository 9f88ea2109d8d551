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

cd "$RUN" || fail "$RUN cannot be entered on $(hostname): is it on a file system that the nodes share?"
mkdir -p logs
# Left over from an interactive launch, these would give every rank the same place.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT
export PYTHONPATH=$CODE${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

# Judges begin and end of every attempt, and keeps attempts.jsonl; prints one word.
judge() { "$PYTHON" -P -m potamos.slurm.attempt "$@"; }

# Waits while the controller is away, an hour at most: what is asked of it then is not refused, only not heard.
controller() {
    local tries
    for ((tries = 0; tries < 360; tries++)); do
        [[ $(scontrol ping 2>/dev/null) == *UP* ]] && return
        [ "$tries" = 0 ] && echo "$(date -Is) the controller does not answer; waiting for it"
        sleep 10
    done
}

# What Slurm says of this job now. All on one line; empty where the controller does not answer.
told() { scontrol show job "$JOB" -o 2>/dev/null | head -n1; }

# Back into the queue; Slurm ends this script while it waits. A refusal is no failure where Slurm was quicker (a node
# died, a preemption): it says that the job is pending.
requeue() {
    local answer
    until answer=$(scontrol requeue "$JOB" 2>&1); do
        case $answer in
        *pending* | *"already"*) echo "already on its way back into the queue"; break ;;
        esac
        [[ $(scontrol ping 2>/dev/null) == *UP* ]] &&
            fail "job $JOB could not be requeued ($answer); go on with: potamos requeue $(printf %q "$RUN")"
        controller
    done
    sleep 300
    exit 0
}

# Judges how the attempt ended, and does what follows. $1: the status of srun; $2: a reason, where srun has none.
conclude() {
    local verdict
    controller
    verdict=$(judge end . --attempt "$ATTEMPT" --status "$1" --why "${2-}" --told "$(told)" --restart "$RESTART" \
        --requeue "$REQUEUE" --crashes "$CRASHES") || exit 1
    echo "$(date -Is) attempt $ATTEMPT: status $1, $verdict"
    case $verdict in
    done | next | stopped) exit 0 ;;
    requeue | busy) requeue ;;
    waiting) exit 0 ;; # Slurm has requeued it already, and starts it once this script is gone
    esac
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
        (sleep $((${patience:-30} * 2 / 3)) && kill -KILL "$CHILD") 2>/dev/null &
        ;;
    esac
}
trap terminated TERM
attend() {
    local status
    "$@" &
    CHILD=$!
    while wait "$CHILD"; status=$?; kill -0 "$CHILD" 2>/dev/null; do :; done
    return "$status"
}

# A submission that was killed before it could note that it was accepted: what it changed here must not be taken back.
for folder in "${CODE%/code}" .; do [ -d "$folder/.undo" ] && judge accepted "$folder"; done

# Ranks that outlived an earlier start of this job may train here still; until they end, nothing else can.
attend "$PYTHON" -P -m potamos.slurm.attempt await . --requeue "$REQUEUE"
ATTEMPT=$(judge begin . --job "$JOB" --restart "$RESTART" --nodes "$SLURM_JOB_NODELIST" --crashes "$CRASHES") || exit 1
[ "$ATTEMPT" = done ] && exit 0
[ -f "busy.$ATTEMPT" ] && conclude 1

# The first node by its address, since its name need not resolve on the others; never this host's idea of itself.
head=${NODES%%,*}
controller
MASTER_ADDR=$(scontrol show node "$head" -o | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
[ -n "$MASTER_ADDR" ] || fail "node $head has no NodeAddr in 'scontrol show node'; the ranks could not meet"
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

if [ "$PREFLIGHT" = 1 ]; then
    # A node that fails must not end the others' checks, which are waited for a little longer than they take (180 s). What
    # asks the run to stop is no finding about a node.
    attend "${SRUN[@]}" --kill-on-bad-exit=0 --wait=600 --ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES" \
        --output="logs/preflight-$ATTEMPT.%n.txt" \
        ${CONTAINER[@]+"${CONTAINER[@]}"} env --block-signal=USR1 --block-signal=TERM \
        "$RANK_PYTHON" -P -m potamos.parallel.node_check --out logs --attempt "$ATTEMPT" --gpus "$GPUS"
    [ -z "$TERMINATED" ] || conclude 143 "asked to stop while the nodes were examined"
    bad=$("$PYTHON" -P -m potamos.parallel.node_check --judge logs --attempt "$ATTEMPT" --nodes "$NODES") ||
        conclude 1 "no node passed the check before training; see logs/preflight-$ATTEMPT.*"
    bad=$(paste -sd, <<<"$bad")
    if [ -n "$bad" ]; then
        # A running job cannot be given other nodes, so another takes its place.
        judge end . --attempt "$ATTEMPT" --bad-nodes "$bad" >/dev/null
        [ "$REQUEUE" = 1 ] || fail "nodes $bad failed the check; the next job of the chain goes on"
        bad=$bad${EXCLUDE:+,$EXCLUDE}${POTAMOS_EXCLUDE:+,$POTAMOS_EXCLUDE}
        home=$(dirname "$CODE")
        # The new job has restarts of its own to count.
        next=$(POTAMOS_EXCLUDE=$bad env -u SLURM_RESTART_COUNT sbatch --parsable --chdir="$home" --exclude="$bad" \
            ${SLURM_ARRAY_TASK_ID:+"--array=$SLURM_ARRAY_TASK_ID"} "$home/submit.sbatch") ||
            fail "nodes $bad failed the check, and no job without them could be submitted"
        judge follow . --job "$next"
        echo "nodes $bad failed the check; job ${next%%;*} goes on without them"
        exit 0
    fi
fi

# Signals that come while Python and torch are being imported are held back until train.py's handlers can take them.
attend "${SRUN[@]}" --output="logs/attempt-$ATTEMPT.rank-%t.txt" --open-mode=append \
    ${CONTAINER[@]+"${CONTAINER[@]}"} env --block-signal=USR1 --block-signal=TERM \
    "$RANK_PYTHON" -P -m potamos.pretrain.cli train recipe.yaml --run . 2> >(tee -a "logs/attempt-$ATTEMPT.srun.txt" >&2)
conclude $?
