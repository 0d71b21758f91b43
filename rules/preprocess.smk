# With data.shards above 1; the number of shards is no param, so that another one redoes nothing.
rule preprocess_shard:
    input:
        corpora_files,
        model=place("model", "manifest.json"),
    output:
        manifest=RUNS.shards / "{scatteritem}" / "manifest.json",
    log:
        RUNS.log("preprocess_shard", ".{scatteritem}.log"),
    benchmark:
        RUNS.log("preprocess_shard", ".{scatteritem}.benchmark.tsv")
    conda:
        "../envs/megaqwen.yaml"
    threads: 4
    params:
        command=stage_command("preprocess.py"),
        digest=digest_of("preprocess"),
        model=place("model", "hf"),
        directory=subpath(output.manifest, parent=True),
    message:
        "preprocess: tokenize shard {wildcards.scatteritem} of the corpora"
    shell:
        "HF_HUB_OFFLINE=1 RAYON_NUM_THREADS={threads} {params.command}"
        " --model {params.model} --shard {wildcards.scatteritem}"
        " --output {params.directory} --log {log}"


rule preprocess:
    input:
        corpora_files,
        model=place("model", "manifest.json"),
        shards=shard_manifests,
    output:
        manifest=RUNS.place("data") / "manifest.json",
    log:
        RUNS.log("preprocess"),
    benchmark:
        RUNS.log("preprocess", ".benchmark.tsv")
    conda:
        "../envs/megaqwen.yaml"
    # On one machine all that Snakemake may use; of a cluster the profile says it.
    threads: workflow.resource_settings.cores or 1
    params:
        command=stage_command("preprocess.py"),
        digest=digest_of("preprocess"),
        model=place("model", "hf"),
        directory=place("data"),
    message:
        "preprocess: tokenize the corpora into Megatron's .bin and .idx"
    shell:
        "HF_HUB_OFFLINE=1 RAYON_NUM_THREADS={threads} {params.command}"
        " --model {params.model} --merge {input.shards} --output {params.directory} --log {log}"
