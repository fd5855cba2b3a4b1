#!/usr/bin/env bash
# What should you send? For each share p1 of hidden neurons: a job with simulated clients, ended without and with
# consolidation, and an attack on what was sent. Prints one table, and writes it as a page. Nothing leaves this machine.
#
#   GLOBAL=my-model BASE=public-model OWN=own.jsonl OTHER=other.jsonl ./run.sh
#   TRANSFER=texts.jsonl ... ./run.sh      for a classifier: unlabelled texts like the clients', to consolidate with
#   P1S="0.5 1" ROUNDS=1 ... ./run.sh      fewer and shorter jobs
#
# A job that is complete is kept: run the script again to go on, or with more values in P1S.
set -euo pipefail

: "${GLOBAL:?your model}" "${BASE:?the public model that it was fine-tuned from}"
: "${OWN:?examples of your own skill (JSONL)}" "${OTHER:?examples like those that clients will have (JSONL)}"
WORK=${WORK:-work}
P1S=${P1S:-0 0.1 0.3 0.5 0.7 0.9 1}  # 0: everything is sent as it is, plain federated averaging
P2=${P2:-0.1}
CLIENTS=${CLIENTS:-3}
ROUNDS=${ROUNDS:-2}
EPOCHS=${EPOCHS:-1}
LR=${LR:-2e-5}
STEPS=${STEPS:-300}                  # of a consolidation
WEIGHT=${WEIGHT:-0.75}               # how much the clients' teacher counts in it
MAX_LENGTH=${MAX_LENGTH:-256}
MINUTES=${MINUTES:-5}                # of attacks on one job

data=$WORK/data length=(--max-length "$MAX_LENGTH")
mapfile -t names < <(seq -f 'client-%g' "$CLIENTS")

# A fifth of the own examples, and one client's share of the others, are the development data.
deal() {
    rm -rf "$data"
    mkdir -p "$data"
    split --number=r/5 --numeric-suffixes=0 --suffix-length=1 "$OWN" "$data/own-"
    split --number="r/$((CLIENTS + 1))" --numeric-suffixes=0 --suffix-length=3 "$OTHER" "$data/other-"
    cat "$data"/own-[1-4] >"$data/own.jsonl"
    mv "$data/own-0" "$data/own-dev.jsonl"
    mv "$data/other-000" "$data/other-dev.jsonl"
    for ((n = 1; n <= CLIENTS; n++)); do mv "$data/other-$(printf %03d "$n")" "$data/client-$n.jsonl"; done
    cat "$data/own-dev.jsonl" "$data/other-dev.jsonl" >"$data/dev.jsonl"
}

# play P1 FOLDER: one job, ended in both ways, and the attack on its first round.
play() {
    local p1=$1 job=$2 n client fill=(--fill base --public-base "$BASE") train=all format=nf4 p2=$P2
    local base=(--public-base "$BASE") blend=(--blend auto --eval-data "$data/dev.jsonl" "${length[@]}")
    case $p1 in
        0) fill=() train=visible format=none p2=0 base=() blend=() ;;
        1) p2=0 ;;
    esac
    local key=(--key "$job/job.key") secrets=(--key "$job/job.key" --ledger "$job/ledger.jsonl")

    fedqsn mask "$GLOBAL" --out "$job/server-0" --p1 "$p1" --where all "${fill[@]}" "${key[@]}" --json >"$job/mask.json"
    for ((n = 1; n <= ROUNDS; n++)); do
        fedqsn export-proxy "$job/server-$((n - 1))" --out "$job/$n/{client}" "${names[@]/#/--client=}" --round "$n" \
            --p2 "$p2" --schedule sticky --format "$format" --train "$train" "${fill[@]}" "${secrets[@]}"
        for client in "${names[@]}"; do
            fedqsn client-train "$job/$n/$client" --out "$job/$n-back/$client" --data "$data/$client.jsonl" \
                --epochs "$EPOCHS" --lr "$LR" --seed "$n" "${length[@]}"
        done
        fedqsn merge "$job/server-$((n - 1))" "${names[@]/#/$job/$n-back/}" --out "$job/server-$n" "${secrets[@]}"
    done
    fedqsn merge "$GLOBAL" --restore "$job/server-$ROUNDS" --out "$job/restored" "${base[@]}" "${blend[@]}" "${key[@]}"
    fedqsn consolidate "$GLOBAL" "$job/server-$ROUNDS" --out "$job/consolidated" --own-data "$data/own.jsonl" \
        ${TRANSFER:+--transfer-data "$TRANSFER"} --steps "$STEPS" --transfer-weight "$WEIGHT" "${base[@]}" \
        "${length[@]}" "${key[@]}"
    # Without a policy the exit code is 3 where attacks are left out: the time was over.
    fedqsn audit "${names[@]/#/$job/1/}" --truth "$GLOBAL" --public-base "$BASE" --eval-data "$data/own-dev.jsonl" \
        --attack-minutes "$MINUTES" "${secrets[@]}" --json >"$job/audit.json" || [[ $? -eq 1 || $? -eq 3 ]]
}

[[ -d $data ]] || deal
for p1 in $P1S; do
    [[ -d $WORK/p1-$p1 ]] && continue
    printf '\n== p1 = %s\n' "$p1"
    rm -rf "$WORK/unfinished"
    mkdir -p "$WORK/unfinished"
    play "$p1" "$WORK/unfinished"
    mv "$WORK/unfinished" "$WORK/p1-$p1"
done

models=("$GLOBAL" "$WORK"/p1-*/{restored,consolidated})
for skill in own other; do
    fedqsn evaluate "${models[@]}" --data "$data/$skill-dev.jsonl" "${length[@]}" --json >"$WORK/$skill.json"
done
python "$(dirname "${BASH_SOURCE[0]}")/report.py" "$WORK" --global "$GLOBAL"
