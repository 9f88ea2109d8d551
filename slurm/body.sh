# --- the same for every job from here on ---

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
export PYTHONPATH=$CODE PYTHONUNBUFFERED=1

# Judges begin and end of every attempt, and keeps attempts.jsonl; prints one word.
judge() { "$PYTHON" -P -m potamos.slurm.attempt "$@"; }

# What Slurm says of this job now. All on one line; empty where the controller does not answer.
told() { scontrol show job "$JOB" -o 2>/dev/null | head -n1; }

# Back into the queue; Slurm ends this script while it waits. A refusal is no failure where Slurm was quicker (a node
# died, a preemption): it says that the job is pending.
requeue() {
    local answer
    answer=$(scontrol requeue "$JOB" 2>&1) || case $answer in
    *pending* | *"already"*) echo "already on its way back into the queue" ;;
    *) fail "job $JOB could not be requeued ($answer); go on with: potamos requeue $(printf %q "$RUN")" ;;
    esac
    sleep 300
    exit 0
}

# Runs a command beside the shell and waits until it is really gone: a signal that the shell traps ends `wait` early.
# The tasks have got that signal from Slurm themselves.
trap 'echo "$(date -Is) the batch script was sent SIGTERM"' TERM
attend() {
    "$@" &
    local child=$! status
    while wait "$child"; status=$?; kill -0 "$child" 2>/dev/null; do :; done
    return "$status"
}

ATTEMPT=$(judge begin . --job "$JOB" --restart "$RESTART" --nodes "$SLURM_JOB_NODELIST" --crashes "$CRASHES") || exit 1
[ "$ATTEMPT" = done ] && exit 0

# The first node by its address, since its name need not resolve on the others; never this host's idea of itself.
head=${NODES%%,*}
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
    # A node that fails must not end the others' checks, which are waited for a little longer than they take (180 s).
    attend "${SRUN[@]}" --kill-on-bad-exit=0 --wait=600 --ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES" \
        --output="logs/preflight-$ATTEMPT.%n.txt" \
        ${CONTAINER[@]+"${CONTAINER[@]}"} "$RANK_PYTHON" -P -m potamos.parallel.node_check --out logs --attempt "$ATTEMPT" --gpus "$GPUS"
    bad=$("$PYTHON" -P -m potamos.parallel.node_check --judge logs --attempt "$ATTEMPT" --nodes "$NODES") ||
        fail "no node passed the check; see $RUN/logs/preflight-$ATTEMPT.*"
    bad=$(paste -sd, <<<"$bad")
    if [ -n "$bad" ]; then
        # A running job cannot be given other nodes, so another takes its place.
        judge end . --attempt "$ATTEMPT" --bad-nodes "$bad" >/dev/null
        [ "$REQUEUE" = 1 ] || fail "nodes $bad failed the check; the next job of the chain goes on"
        bad=$bad${EXCLUDE:+,$EXCLUDE}${POTAMOS_EXCLUDE:+,$POTAMOS_EXCLUDE}
        home=$(dirname "$CODE")
        next=$(POTAMOS_EXCLUDE=$bad sbatch --parsable --chdir="$home" --exclude="$bad" \
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
status=$?

verdict=$(judge end . --attempt "$ATTEMPT" --status "$status" --told "$(told)" --restart "$RESTART" --requeue "$REQUEUE" --crashes "$CRASHES") || exit 1
echo "$(date -Is) attempt $ATTEMPT: srun's status $status, $verdict"
case $verdict in
done | next | stopped) exit 0 ;;
requeue) requeue ;;
waiting) exit 0 ;; # Slurm has requeued it already, and starts it once this script is gone
esac
[ "$status" -ne 0 ] && exit "$status"
exit 1
