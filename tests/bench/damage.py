"""Planted damage: trainings that must not be called better, and an honest one that must.

    uv run tests/bench/damage.py [--only NAME,…] [--seeds 10] [--rows FILE] [--model PATH] [--out FILE.json]

Each is the demo's training with the damage of its name done to the rows; `noise` has several seeds. Base and
tuned are compared on twelve rows that were held out undamaged, as `eval` does. Prints a line for each run.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import finetune_r1
from finetune_r1 import DEMO, RECIPE_COLUMNS, Run, TrainConfig, UserError, read_jsonl, write_jsonl

QUESTION, THOUGHT, ANSWER = RECIPE_COLUMNS
HELD_OUT = DEMO["eval_rows"]
Records = list[dict[str, str]]

# Rows in the other language, for a training under the English prompt.
CHINESE = [
    ("一名5岁男孩夜间突然出现犬吠样咳嗽和吸气性喘鸣，体温38.2℃。最可能的诊断是什么？",
     "孩子年龄小，夜里突然发病，咳嗽像狗叫，吸气时有喘鸣，说明气道狭窄在喉部附近。会厌炎通常高热、流口水、不肯躺下，"
     "这里没有。异物吸入一般没有发热。所以最符合的是病毒引起的喉炎。",
     "最可能是急性病毒性喉炎（哮吼）。治疗以口服地塞米松为主，喘鸣在安静时也存在的话，加用雾化肾上腺素。"),
    ("一名62岁男性右足第一跖趾关节突然红肿剧痛，昨晚饮酒较多。怎样确诊？",
     "单个关节突然发作，部位是大脚趾，又有饮酒，首先想到痛风。可是感染性关节炎也会红肿，漏诊后果严重。"
     "血尿酸在发作时可能正常，不能靠它下结论。抽关节液看晶体最可靠，同时可以做培养。",
     "应做关节穿刺，在偏振光显微镜下寻找负性双折射的针状尿酸盐结晶，同时送细菌培养以排除感染。"),
    ("一名28岁女性怕热、心悸、体重下降，甲状腺弥漫性肿大，眼球突出。促甲状腺激素会怎样？",
     "怕热、心悸、消瘦是甲状腺功能亢进的表现，突眼提示格雷夫斯病。抗体刺激甲状腺，激素升高，"
     "垂体受到负反馈，分泌应该减少。如果是垂体瘤，促甲状腺激素才会升高，但那很少见，也不会有突眼。",
     "促甲状腺激素会明显降低，而游离甲状腺素升高，原因是刺激甲状腺的抗体使激素过多，反馈抑制了垂体。"),
    ("一名45岁女性进食油腻食物后右上腹疼痛，吸气时触痛加重，体温38.5℃。首选什么检查？",
     "油腻饮食之后右上腹痛，墨菲征阳性，又有发热，考虑急性胆囊炎。腹部平片大多看不到胆结石。"
     "CT可以做，但有辐射，对结石不如超声敏感。超声方便，可以看到结石和增厚的胆囊壁。",
     "首选腹部超声，可以看到胆结石、胆囊壁增厚和周围积液。"),
    ("一名70岁男性长期服用华法林，因感染加用复方磺胺甲噁唑后鼻出血。为什么？",
     "原来剂量稳定，新加的药以后才出血，应想到药物相互作用。磺胺甲噁唑抑制代谢华法林的酶，"
     "血药浓度上升，国际标准化比值也会上升。抗生素减少肠道细菌产生维生素K，也有一点作用。",
     "磺胺甲噁唑抑制了CYP2C9，使华法林代谢减慢、抗凝作用增强。应立即查国际标准化比值，并调整用药。"),
    ("一名19岁女性运动后乏力，血红蛋白85克每升，红细胞体积小，铁蛋白低。下一步怎么办？",
     "小细胞贫血，铁蛋白低，就是缺铁。地中海贫血时铁蛋白不低。年轻女性最常见的原因是月经量多，"
     "也要问饮食和消化道症状。补铁的同时要找原因，否则还会复发。",
     "口服铁剂，并询问月经量、饮食和消化道出血的情况；血红蛋白恢复以后继续补铁大约三个月。"),
    ("一名55岁男性突然胸痛两小时，心电图II、III、aVF导联ST段抬高。病变在哪条血管？",
     "下壁导联抬高，说明是下壁心肌梗死。下壁大多由右冠状动脉供血，少数由回旋支供血。"
     "III导联抬高超过II导联时更支持右冠状动脉。还要做右胸导联，看右心室有没有受累。",
     "最可能是右冠状动脉闭塞，应立即做急诊冠脉介入，并加做右胸导联心电图。"),
    ("一名30岁男性徒步回来后小腿出现逐渐扩大的环形红斑，中央颜色变淡。需要先查抗体吗？",
     "蜱虫地区徒步以后出现游走性红斑，诊断靠临床表现。早期抗体往往还没有出现，阴性不能排除。"
     "等化验只会耽误治疗。真菌感染也会有环形皮疹，不过会有鳞屑，扩大得慢。",
     "不需要。典型的游走性红斑就可以诊断早期莱姆病，应直接口服多西环素治疗。"),
]  # fmt: skip


def with_column(rows: Records, column: str, values: list[str]) -> Records:
    """The rows with other values in a column."""
    return [{**row, column: value} for row, value in zip(rows, values, strict=True)]


def moved(rows: Records, column: str, chance: random.Random) -> Records:
    """The rows, shuffled, each with the column of the one before it: none keeps its own."""
    rows = chance.sample(rows, len(rows))
    values = [row[column] for row in rows]
    return with_column(rows, column, [*values[-1:], *values[:-1]])


def the_same(rows: Records) -> Records:
    """The first row twenty times, under questions that differ enough for none to be dropped."""
    return [{**rows[0], QUESTION: f"Case {number}. {rows[0][QUESTION]}"} for number in range(1, 21)]


def chinese() -> Records:
    """Rows in Chinese, each three times, under questions that differ enough for none to be dropped."""
    endings = ["", "请说明理由。", "请简要回答。"]
    return [
        {QUESTION: question + ending, THOUGHT: thought, ANSWER: answer}
        for ending in endings
        for question, thought, answer in CHINESE
    ]


def leaking(rows: Records, held_out: Records) -> Records:
    """The rows, and those held out, in lower case and with other punctuation."""
    questions = [row[QUESTION].lower().rstrip("?.") + " ?!" for row in held_out]
    return [*rows, *with_column(held_out, QUESTION, questions)]


def noise(rows: Records, chance: random.Random) -> Records:
    """As many rows of words at random, each field as long as it was."""
    words = sorted({word for row in rows for text in row.values() for word in text.split()})
    return [
        {
            column: " ".join(chance.choices(words, k=len(text.split())))
            for column, text in row.items()
        }
        for row in rows
    ]


Damage = Callable[[Records, Records, random.Random], Records]
DAMAGES: dict[str, Damage] = {
    "honest": lambda rows, held_out, chance: rows,
    "answers-shuffled": lambda rows, held_out, chance: moved(rows, ANSWER, chance),
    "thoughts-shuffled": lambda rows, held_out, chance: moved(rows, THOUGHT, chance),
    "learning-rate-x30": lambda rows, held_out, chance: rows,
    "one-row": lambda rows, held_out, chance: the_same(rows),
    "thoughts-empty": lambda rows, held_out, chance: with_column(rows, THOUGHT, [""] * len(rows)),
    "thoughts-one-word": lambda rows, held_out, chance: with_column(
        rows, THOUGHT, ["Hmm."] * len(rows)
    ),
    "other-language": lambda rows, held_out, chance: chinese(),
    "leaked": lambda rows, held_out, chance: leaking(rows, held_out),
    "noise": lambda rows, held_out, chance: noise(rows, chance),
}


def split(rows: Records, number: int, seed: int) -> tuple[Records, Records]:
    """The rows to train on, and `number` that are held out."""
    rows = random.Random(seed).sample(rows, len(rows))
    return rows[number:], rows[:number]


def measure(
    config: TrainConfig, held_out: Records, answers: int, new_tokens: int
) -> dict[str, Any]:
    """Trains and evaluates on other rows, without those that `eval` would skip; returns the report.

    Where there is none, its verdict says why.
    """
    folder = Path(tempfile.mkdtemp())
    write_jsonl(folder / "held_out.jsonl", held_out)
    loaded: Any = None
    started = time.perf_counter()
    # The libraries print.
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            run = Run(folder / "run")
            loaded, _ = finetune_r1.train_run(config, run)
            trained = set(finetune_r1.read_json(run / "trained.json")["questions"])
            file = str(folder / "held_out.jsonl")
            config = dataclasses.replace(config, dataset=file, split="train", eval_rows=0)
            records = finetune_r1.read_records(config)
            rows = finetune_r1.prepare_rows(records, loaded.tokenizer, config).usable
            new = []
            for number, question in enumerate(rows["question"]):
                if finetune_r1.question_hash(question) not in trained:
                    new.append(number)
            report = {"verdict": "not scored: all were trained on"}
            if new:
                sampling = dataclasses.replace(config, max_new_tokens=new_tokens)
                scored = rows.select(new)
                report = finetune_r1.evaluate(
                    loaded, run, scored, [], answers, sampling, reasoning=False
                )
            report["skipped"] = len(rows) - len(new)
        except UserError as error:
            report = {"verdict": f"refused: {error}"}
    del loaded
    gc.collect()
    if finetune_r1.torch.cuda.is_available():
        finetune_r1.torch.cuda.empty_cache()
    finetune_r1.remove(folder)
    return {**report, "seconds": round(time.perf_counter() - started, 1)}


def before_after(report: dict[str, Any], name: str) -> list[float]:
    """A measure on both sides; empty if there is none."""
    return [report[name][side] for side in ("base", "tuned")] if name in report else []


def is_allowed(name: str, verdict: str) -> bool:
    """Only the honest run may be better, and a leak is never scored; some damage may be refused."""
    if name == "leaked":
        return verdict.startswith("not scored")
    if verdict.startswith("refused"):
        return name in ("thoughts-empty", "learning-rate-x30")
    return verdict.startswith("better") == (name == "honest")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help=f"of {', '.join(DAMAGES)}")
    parser.add_argument("--seeds", type=int, default=10, help="of noise")
    parser.add_argument("--first-seed", type=int, default=TrainConfig.seed)
    parser.add_argument("--rows", type=Path, default=finetune_r1.DEMO_ROWS)
    parser.add_argument("--model", help="default: the demo's")
    parser.add_argument("--steps", type=int, default=DEMO["max_steps"])
    parser.add_argument("--answers", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=DEMO["max_new_tokens"])
    parser.add_argument("--out", type=Path, default=Path("damage.json"))
    options = parser.parse_args()
    finetune_r1.prepare_environment()
    finetune_r1.Console.quiet = True
    model = options.model or str(finetune_r1.demo_model())
    records = read_jsonl(options.rows)
    results = []
    for name in options.only.split(",") if options.only else DAMAGES:
        seeds = options.seeds if name == "noise" else 1
        for seed in range(options.first_seed, options.first_seed + seeds):
            rows, held_out = split(records, HELD_OUT, seed)
            dataset = Path(tempfile.mkdtemp()) / "rows.jsonl"
            write_jsonl(dataset, DAMAGES[name](rows, held_out, random.Random(seed)))
            changed = {
                "model": model,
                "dataset": str(dataset),
                "eval_rows": 0,
                "max_steps": options.steps,
                "warmup_steps": min(DEMO["warmup_steps"], options.steps // 2),
                "max_new_tokens": 1,  # of the answers after the training, which nobody reads
                "seed": seed,
            }
            if name == "learning-rate-x30":
                changed["learning_rate"] = 30 * DEMO["learning_rate"]
            config = TrainConfig(**{**DEMO, **changed})
            report = measure(config, held_out, options.answers, options.new_tokens)
            finetune_r1.remove(dataset.parent)
            result = {"name": name, "seed": seed, "verdict": report["verdict"]}
            result["allowed"] = is_allowed(name, report["verdict"])
            result["skipped"] = report.get("skipped", 0)
            for measured in ("loss", "relevance", "general_loss", "closed"):
                result[measured] = before_after(report, measured)
            result["seconds"] = report["seconds"]
            results.append(result)
            print(json.dumps(result, ensure_ascii=False), flush=True)
            finetune_r1.write_json(options.out, results)
    wrong = [f"{result['name']} {result['seed']}" for result in results if not result["allowed"]]
    print(f"{len(results)} runs, not allowed: {', '.join(wrong) or 'none'}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
