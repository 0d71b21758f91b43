rule convert:
    input:
        model=place("model", "manifest.json"),
    output:
        manifest=RUNS.place("megatron") / "manifest.json",
    log:
        RUNS.log("convert"),
    benchmark:
        RUNS.log("convert", ".benchmark.tsv")
    conda:
        "../envs/megaqwen.yaml"
    params:
        command=stage_command("convert.py"),
        digest=digest_of("convert"),
        model=place("model", "hf"),
        directory=place("megatron"),
    message:
        "convert: Hugging Face safetensors to a Megatron torch_dist checkpoint"
    shell:
        "HF_HUB_OFFLINE=1 {params.command}"
        " --model {params.model} --output {params.directory} --log {log}"
