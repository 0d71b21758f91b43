rule download:
    input:
        model_files,
    output:
        manifest=RUNS.place("model") / "manifest.json",
    log:
        RUNS.log("download"),
    benchmark:
        RUNS.log("download", ".benchmark.tsv")
    conda:
        "../envs/megaqwen.yaml"
    params:
        command=stage_command("download.py"),
        digest=digest_of("download"),
        directory=place("model"),
    message:
        "download: bring the Hugging Face model"
    shell:
        "{params.command} --output {params.directory}" " --log {log}"
