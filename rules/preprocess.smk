scattergather:
    shards=SHARDS,


# With data.shards above 1; the number of shards is no param, so that another one redoes nothing.
rule preprocess_shard:
    input:
        corpora_files,
        model=rules.download.output.manifest,
    output:
        manifest=LAYOUT.shards / "{scatteritem}" / "manifest.json",
    log:
        LOGS / "preprocess_shard.{scatteritem}.log",
    benchmark:
        LOGS / "preprocess_shard.{scatteritem}.benchmark.tsv"
    conda:
        "../envs/megaqwen.yaml"
    threads: 4
    params:
        command=stage_command("preprocess.py"),
        digest=LAYOUT.stage_digest("preprocess"),
        model=LAYOUT.model / "hf",
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
        model=rules.download.output.manifest,
        shards=shard_manifests,
    output:
        manifest=LAYOUT.data / "manifest.json",
    log:
        LOGS / "preprocess.log",
    benchmark:
        LOGS / "preprocess.benchmark.tsv"
    conda:
        "../envs/megaqwen.yaml"
    params:
        command=stage_command("preprocess.py"),
        digest=LAYOUT.stage_digest("preprocess"),
        model=LAYOUT.model / "hf",
        directory=LAYOUT.data,
    message:
        "preprocess: tokenize the corpora into Megatron's .bin and .idx"
    shell:
        "HF_HUB_OFFLINE=1 {params.command}"
        " --model {params.model} --merge {input.shards} --output {params.directory} --log {log}"
