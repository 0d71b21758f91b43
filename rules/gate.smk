# Training waits for this verdict, and for no later one: a rule that measures again when only the texts
# of the comparison change would make Snakemake train again.
rule parity_gate:
    input:
        checkpoint=place("megatron", "manifest.json"),
        data=place("data", "manifest.json"),
    output:
        verdict=RUNS.place("gate") / "parity.json",
    log:
        RUNS.log("parity_gate"),
    benchmark:
        RUNS.log("parity_gate", ".benchmark.tsv")
    conda:
        "../envs/megaqwen.yaml"
    threads: 1
    resources:
        nodes=parity_nodes("parity_gate"),
        ranks_per_node=parity_ranks_per_node("parity_gate"),
        tasks=parity_ranks,
        slurm_extra=parity_extra("parity_gate"),
        gpus_per_node=0,
        launcher="torchrun",
        environment="",
    params:
        launch=parity_launch,
        command=parity_command,
        digest=digest_of("gate"),
        model=place("model", "hf"),
        checkpoint=place("megatron", "checkpoint"),
        data=place("data"),
    message:
        "parity gate: is the converted checkpoint the Hugging Face model?"
    shell:
        "HF_HUB_OFFLINE=1 {params.launch} --launcher {resources.launcher}"
        " --nodes {resources.nodes} --ranks-per-node {resources.ranks_per_node}"
        " --gpus-per-node {resources.gpus_per_node} --cpus-per-rank {threads}"
        " --environment '{resources.environment}' --log {log}"
        " {params.command} --crossing convert"
        " --model {params.model} --checkpoint {params.checkpoint}"
        " --checkpoint-manifest {input.checkpoint} --data {params.data}"
        " --output {output.verdict}"
