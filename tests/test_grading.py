"""Multiple choice: a record becomes a question, and an answer a letter, whatever its style."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prompts

OPTIONS = {
    "A": "Aspirin",
    "B": "Heparin",
    "C": "Low-dose aspirin",
    "D": "Vitamin D",
    "E": "Hepatitis B vaccine",
}
CHINESE_OPTIONS = {"A": "阿司匹林", "B": "肝素", "C": "低剂量阿司匹林", "D": "维生素D"}
NINE_OPTIONS = dict(
    zip(
        "ABCDEFGHI",
        ["rest", "water", "salt", "sugar", "iron", "zinc", "iodine", "lead", "gold"],
        strict=True,
    )
)

# What is said, by what it comes to; None is what can't be read, or stays open.
ENGLISH = {
    "A": [
        "Give aspirin.",
        "The answer is aspirin.",
        "The best choice is aspirin (A).",
        "A is the answer.",
        "Answer A",
        "A) Aspirin",
        "A. Aspirin is the right drug for this patient.",
    ],
    "B": [
        "Answer: **B**",
        "Option A is tempting, but option B is right.",
        "Let us look at the options:\nA. Aspirin\nB. Heparin\nC. Low-dose aspirin\nTherefore, B is "
        "the best choice.",
        "HEPARIN is what she needs, at once.",
        "The answer that fits best is B.",
        "This points to B as the correct answer.",
        "Therefore, the correct option is:\n\nB. Heparin",
        "Therefore, the answer is (B), heparin, not (A) or (C).",
        "Of these, only B fits.",
        "Choose B.",
    ],
    "C": [
        "The answer is C.",
        "The correct answer is: C",
        "The correct answer is **C**.",
        "The correct answer is **C. Low-dose aspirin**.",
        "**C. Low-dose aspirin**",
        "The correct option is C.",
        "The correct option is (C).",
        "I would go for option **C**",
        "\\boxed{C}",
        "The final answer is $\\boxed{\\text{C}}$.",
        "\\[\\boxed{\\text{(C)}}\\]",
        "Therefore, (C) is correct.",
        "The answer I chose is C",
        "The answer is C, not answer A",
        "Answer: C",
        "**Answer:** C",
        "**Final Answer**\n\nC. Low-dose aspirin",
        "### Answer\n\n**C**",
        "Answer: (C) Low-dose aspirin",
        "C",
        "C.",
        "[C]",
        "Ｃ",
        "（Ｃ）",
        "C) Low-dose aspirin",
        "C: Low-dose aspirin",
        "C. It prevents the next stroke.",
        "option (C)",
        "Option C",
        "choice C",
        "I would choose C.",
        "I'd pick option C, as the others carry risks.",
        "I'm going with C.",
        "C is the correct answer.",
        "C is correct.",
        "Option C, low-dose aspirin, is the right choice.",
        "Option C is the most appropriate answer here.",
        "The best answer is therefore C.",
        "The most likely answer is C because it lowers the risk.",
        "The correct answer would be C, since she had a stroke.",
        'So the answer is "C".',
        "Therefore, C.",
        "It's C.",
        "My choice: C",
        "The correct choice is C - Low-dose aspirin.",
        "Based on the findings, the correct answer is:\n\n**C. Low-dose aspirin**",
        "<answer>C</answer>",
        "A is incorrect, and so is B. The answer is C.",
        "We can rule out B. The answer must be C.",
        "Unlike D, option C lowers the risk.",
        "A is wrong, B is wrong, D is wrong. C is right.",
        "A, B and D are incorrect; C is correct.",
        "The answer isn't A but C.",
        "The answer is C rather than B.",
        "C is correct, whereas A is not.",
        "The answer is A or C. On balance, the answer is C.",
        "Is the answer A? No, it is C.",
        "A. Aspirin - too strong.\nB. Heparin - too short.\nC. Low-dose aspirin - lowers the "
        "risk.\nD. Vitamin D - no effect.\n\nThe correct answer is C.",
        "C. Low-dose aspirin\n\nWhy not the others:\nA. Aspirin bleeds.\nB. Heparin is for the acute phase.",
        "She should take low-dose aspirin.",
        "Aspirin and heparin carry risks. The correct answer is **low-dose aspirin**.",
        "The most appropriate answer is **(C) Low-dose aspirin**.",
        "Based on the clinical presentation, the correct answer is **C: Low-dose aspirin**.",
        "Thus, the answer should be C.",
        "Hence, the correct answer is option (C).",
        "So, my final answer is C",
        "The right answer is C!",
        "I believe the answer is C.",
        "I'd say C.",
        "I think C is the best option.",
        "C is the best answer because it reduces the risk of stroke.",
        "Option C is correct. Option A is incorrect because of bleeding. Option B is incorrect "
        "because it is short-acting.",
        "Option C: Low-dose aspirin is the correct answer.",
        "Correct answer: C",
        "Correct Answer: (C)",
        "**Correct Answer:** **C) Low-dose aspirin**",
        "**Answer: C. Low-dose aspirin**\n\n**Explanation:**\n- **A. Aspirin** in full dose "
        "bleeds.\n- **B. Heparin** is for the acute phase.\n- **D. Vitamin D** has no effect.",
        "The answer is C) Low-dose aspirin.",
        "Among the given options, C is the most appropriate.",
        "Among the options provided, low-dose aspirin (option C) is the best choice.",
        "The treatment of choice is low-dose aspirin.",
        "The best next step is to give low-dose aspirin (C).",
        "The correct response is letter C.",
        "A: Aspirin is contraindicated. B: Heparin is contraindicated. D: no use. The answer, then, is C.",
        "The correct answer is not A, B or D; it is C.",
        "The correct answer is C, not A, B or D.",
        "While A is plausible, C better explains the findings.",
        "While option A is plausible, option C is more likely.",
        "The patient has had a stroke. In summary, the most suitable treatment is low-dose aspirin.",
        "In summary, she should be given low-dose aspirin rather than heparin.",
    ],
    "D": [
        "The correct answer is option D, as the others are harmless.",
        "The correct answer is D) Vitamin D.",
        "At first the answer seems to be A. However, she bleeds, so the answer is D.",
        "I considered A and B, but I chose D.",
        "The correct answer is vitamin D.",
        "Unlike heparin, vitamin D is safe.",
        "Given these findings, option D would be the best choice.",
        "Pick D",
        "Answer is D",
        "ANSWER: D",
        "answer: D",
        "The answer → D",
        "Final choice: D.",
        "Selected option: D",
        "D, because vitamin D is harmless.",
        "D - Vitamin D",
        "D – Vitamin D",
        "(D) Vitamin D",
        "- D. Vitamin D",
        "> D. Vitamin D",
        "*D*",
        "`D`",
        "The answer is D\n",
        "\n\nD\n\n",
        "A can be ruled out, B can be excluded, so D is the answer.",
    ],
    "E": [
        "(E)",
        "The most likely answer is hepatitis B vaccine.",
    ],
    None: [
        "",
        "I do not know.",
        "A patient like this should rest.",
        "The answer is a beta blocker.",
        "The answer is A patient who rests.",
        "A 45-year-old man needs rest.",
        "The answer is F.",
        "The answer is A or C.",
        "The answer is either B or D.",
        "Both A and C are correct.",
        "A is incorrect.",
        "The answer is not A.",
        "Neither A nor B.",
        "We can rule out B and D.",
        "Aspirin or heparin would do.",
        "She should not take heparin.",
        "Options:\nA. Aspirin\nB. Heparin\nC. Low-dose aspirin\nD. Vitamin D",
        "Vitamin C is the best choice.",
        "The answer is C. difficile colitis.",
        "E. coli is the cause.",
        "The answer is hepatitis A.",
        "The patient has type A blood, and B cells are low.",
        "Group B streptococci are the cause.",
        "I would need more tests.",
        "None of the options is right.",
        "The answer cannot be determined.",
        "It depends on the dose.",
        "A doctor should decide. A or B may help.",
        "Both aspirin and heparin are reasonable.",
        "Neither aspirin nor heparin is indicated.",
        "All of the options are correct.",
        "The answer is none of the above.",
        "The answer is vitamin B12.",
        "The answer is hepatitis C infection.",
        "B-cell lymphoma is the most likely diagnosis.",
        "The most likely diagnosis is influenza A.",
        "Options A, B and C are all correct.",
        "A 30-year-old woman needs a CT scan.",
        "The correct answer is one of A, B or C.",
        "In conclusion, more data are needed.",
        "The answer is not C.",
        "C is not the right answer.",
    ],
}
CHINESE = {
    "A": [
        "选A",
        "A项符合题意",
        "答案为A项。",
    ],
    "B": [
        "首选肝素。",
        "综上，正确选项是B：肝素",
        "B选项是最佳选择。",
        "我会选择B。",
        "选项B",
        "B。",
        "B、肝素",
        "（B）肝素",
        "【答案】B",
        "答案：B\n解析：A会出血。",
        "A选项不正确，B选项正确。",
        "A不对，应该选B。",
        "与A不同，B更合适，所以答案为B",
        "最佳治疗是肝素。",
    ],
    "C": [
        "答案是C",
        "答案：C",
        "选C",
        "故选C。",
        "因此，应选择C项。",
        "正确选项为 C",
        "因此答案为：C",
        "正确答案是 **C. 低剂量阿司匹林**。",
        "正确答案是选项C。",
        "最佳答案是（Ｃ）。",
        "C选项正确。",
        "C是正确答案。",
        "选项C是正确的。",
        "所以，C正确。",
        "答案是C，而不是A。",
        "答案不是A，而是C。",
        "A错误，B错误，D错误，因此选C。",
        "A、B、D均不正确，C正确。",
        "综上所述，答案是\\boxed{C}。",
        "Ｃ．低剂量阿司匹林",
        "我认为是C。",
        "应使用低剂量阿司匹林。",
        "正确答案：C。",
        "正确答案为C选项",
        "答案选C。",
        "本题应选C。",
        "因此，最可能的答案是C。",
        "最合适的选项是C。",
    ],
    "D": [
        "可以排除B，答案为D。",
        "不应使用肝素，应使用维生素D。",
        "答案是维生素D。",
    ],
    None: [
        "不知道。",
        "答案是A或C。",
        "A错误。",
        "排除B。",
        "答案是C反应蛋白。",
        "维生素C是正确的。",
        "需要进一步检查。",
        "A和C都正确。",
        "无法确定。",
        "A、B都有可能。",
        "答案不是C。",
        "C不正确。",
        "患者为A型血。",
        "乙型肝炎病毒B抗原是阳性。",
    ],
}
OF_NINE = {
    "C": ["The answer I chose is C", "I would give salt."],
    "I": ["I is right.", "I. gold", "I"],
    None: ["I am not sure."],
}
PHRASINGS = []
for options, table in ((OPTIONS, ENGLISH), (CHINESE_OPTIONS, CHINESE), (NINE_OPTIONS, OF_NINE)):
    for letter, answers in table.items():
        PHRASINGS += [pytest.param(options, answer, letter, id=answer) for answer in answers]


@pytest.mark.parametrize(("options", "answer", "letter"), PHRASINGS)
def test_the_letter_that_an_answer_settles_on(options, answer, letter):
    assert prompts.predicted_option(answer, options) == letter


@settings(max_examples=100, deadline=None)
@given(
    pieces=st.lists(
        st.sampled_from([*"ABCD.,:()\\ \n", *ENGLISH["C"], *ENGLISH[None]]) | st.text(max_size=9)
    ),
    texts=st.lists(st.text(max_size=9), min_size=2, max_size=5),
)
def test_any_text_can_be_graded(pieces, texts):
    options = dict(zip("ABCDE", texts, strict=False))
    assert prompts.predicted_option("".join(pieces), options) in (None, *options)


# -------------------------------------------------------------------------------------------------- records

TEXTS = ["rest", "water", "salt", "sugar"]
MEDMCQA = dict(zip(("opa", "opb", "opc", "opd"), TEXTS, strict=True)) | {
    "choice_type": "single",
    "exp": None,
}


@pytest.mark.parametrize(
    ("record", "letter"),
    [
        (
            {
                "options": dict(zip("ABCD", TEXTS, strict=True)),
                "answer_idx": "B",
                "answer": "water",
            },
            "B",
        ),
        ({"options": dict(zip("ABCD", TEXTS, strict=True)), "answer_idx": 1}, "B"),
        ({"options": dict(zip("ABCDE", [*TEXTS, None], strict=True)), "answer_idx": "D"}, "D"),
        ({"options": dict(zip("ABCDE", [*TEXTS, None], strict=True)), "answer_idx": "E"}, None),
        ({"options": dict(zip("1234", TEXTS, strict=True)), "answer_idx": "4"}, "D"),
        ({"options": dict(zip("1234", TEXTS, strict=True)), "answer_idx": "2"}, "B"),
        ({"options": dict(zip("BADC", TEXTS, strict=True)), "answer_idx": "B"}, "A"),
        ({"options": TEXTS, "answer_idx": "B"}, "B"),
        ({"options": TEXTS, "answer_idx": 3}, "D"),
        ({"options": TEXTS, "answer_idx": "3"}, "D"),
        ({"options": TEXTS, "answer_idx": 4}, None),
        ({"options": TEXTS, "answer_idx": "E"}, None),
        ({"options": TEXTS, "answer_idx": None}, None),
        ({"choices": TEXTS, "answer": 0, "subject": "anatomy"}, "A"),
        (MEDMCQA | {"cop": 2}, "C"),
        (MEDMCQA | {"cop": -1}, None),
        (MEDMCQA | {"cop": 1, "question": None}, None),
    ],
)
def test_a_multiple_choice_record_is_read_by_its_columns_or_left_out(record, letter):
    [columns] = [pair for pair in prompts.CHOICE_COLUMNS if set(pair) <= set(record)]
    choice = prompts.parse_multiple_choice({"question": "What helps?"} | record, columns)
    assert (choice and choice.key) == letter
    if choice:
        options = "A. rest\nB. water\nC. salt\nD. sugar"
        assert choice.text == f"What helps?\n{options}\nSay which option is right."


# ------------------------------------------------------------------------------------------ nearly the same

CASE = "A 45-year-old man presents with {} for two days. {} What is the most likely diagnosis?"
TRAINED = [
    CASE.format(
        "crushing chest pain and sweating",
        "His father died of a stroke, and he smokes a pack a day.",
    ),
    CASE.format(
        "a swollen painful right knee", "He had gonorrhoea last month and was never treated for it."
    ),
    CASE.format(
        "blood in his urine", "Both kidneys are large on ultrasound, as were his mother's."
    ),
    "Which drug reverses an overdose of morphine given by mistake?",
    "一位45岁男性因突发胸痛两天就诊，有吸烟史，父亲死于中风。最可能的诊断是什么？",
    "一位45岁男性因右膝关节肿痛两天就诊，上个月曾患淋病未治疗。最可能的诊断是什么？",
    "哪种药物可以逆转吗啡过量引起的呼吸抑制？",
    "What is the most common cause of anaemia?",
    "What is the most common cause of pancreatitis?",
    "What is the most common cause of blindness?",
]
NEARLY = [
    (0, ("45-year-old man", "52-year-old woman")),
    (0, ("two days", "6 hours")),
    (0, ("What is the most likely", "Which of these is the likeliest")),
    (1, ("He had gonorrhoea last month and was", "He had had gonorrhoea and it was")),
    (2, ("?", "?\nA. Polycystic kidneys\nB. Stones\nC. Cystitis\nD. Cancer of the bladder")),
    (3, ("given by mistake", "in a child")),
    (4, ("45岁男性", "52岁女性")),
    (5, ("？", "？\nA. 淋菌性关节炎\nB. 痛风\nC. 创伤")),
    (6, ("引起的", "导致的")),
]
OTHERS = [
    CASE.format("double vision", "He lost weight, and his hands tremble when he holds them out."),
    "A 45-year-old man presents with fever. What is the most likely diagnosis?",
    "Which drug reverses the effect of heparin?",
    "What is the most common cause of nosebleeds?",
    "一位45岁男性因视物模糊两天就诊，体重下降，双手震颤。最可能的诊断是什么？",
    "哪种药物可以治疗高血压？",
    "What is the most likely diagnosis?",
    "Why?",
    "",
]


@pytest.fixture(scope="module")
def kept():
    return [set(sketch.split()) for sketch in prompts.sketches(TRAINED)]


@pytest.mark.parametrize(("number", "change"), NEARLY)
def test_a_question_that_was_changed_a_little_is_known_again(kept, number, change):
    changed = TRAINED[number].replace(*change)
    assert changed != TRAINED[number] and prompts.is_near(changed, [kept[number]])


@pytest.mark.parametrize("question", OTHERS)
def test_another_question_of_the_same_pattern_is_another(kept, question):
    assert not prompts.is_near(question, kept)
    for number, trained in enumerate(TRAINED):
        assert not prompts.is_near(trained, kept[:number] + kept[number + 1 :])


def test_twenty_thousand_questions_are_kept_in_two_megabytes():
    sketches = prompts.sketches(
        [f"{question} {number}" for number in range(200) for question in TRAINED]
    )
    kept = {f"{number:016x}": sketch for number, sketch in enumerate(sketches)}
    assert len(json.dumps(kept, indent=2)) / len(kept) * 20_000 < 2_000_000
