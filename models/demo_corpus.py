"""The text that the demonstration model is trained on.

Three sources, all under the licence of the Python Software Foundation: the help topics which come with the interpreter
(``pydoc_data.topics``), the doc strings of the standard library (read with ``ast``, nothing is imported), and a folder
of Python's documentation in reStructuredText. Each gives plain documents, and short chats made from them by rule: a
question from a template, and the first paragraphs of the description as the answer.
"""

import ast
import hashlib
import pydoc_data.topics
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

Message = dict[str, str]

HELD_OUT_PER_MILLE = 20
ANSWER_CHARS = 520
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "ensurepip",
    "turtledemo",
    "__pycache__",
    "pydoc_data",
    "idlelib",
    "lib2to3",
    "distutils",
    "encodings",
    "msilib",
}
SKIPPED_DOCS = {
    "license",
    "copyright",
    "contents",
    "includes",
    "changelog",
    "whatsnew",
    "c-api",
    "distutils",
    "extending",
}


@dataclass(frozen=True)
class Question:
    """One thing that can be asked about, and what to answer."""

    kind: str
    name: str
    answer: str


@dataclass
class Document:
    """A text with a name, and the questions which it answers."""

    name: str
    text: str
    questions: list[Question] = field(default_factory=list)

    @property
    def held_out(self) -> bool:
        """Whether the document is kept out of training: settled by its name alone."""
        return (
            int.from_bytes(hashlib.sha256(f"demo {self.name}".encode()).digest()[:4], "big") % 1000 < HELD_OUT_PER_MILLE
        )


# --- reStructuredText -------------------------------------------------------------------------------------------------

INLINE = [
    (re.compile(r"\[?https?://[^\s>`\])]+\]?"), ""),
    (re.compile(r"\b(?:www|docs|test|upload|files)?\.?py(?:pi|thon(?:hosted)?)(?:\.python)?\.(?:org|io)\b\S*"), ""),
    (re.compile(r":(?:[\w+]+:)?[\w+-]+:`[!~]?([^`<]+?)\s*<[^`>]*>`"), r"\1"),
    (re.compile(r":pep:`(\d+)`"), r"PEP \1"),
    (re.compile(r":rfc:`(\d+)`"), r"RFC \1"),
    (re.compile(r":issue:`(\d+)`"), r"issue \1"),
    (re.compile(r":(?:c:|py:)?(?:meth|func|class|attr|mod|exc|data|keyword|const):`[!~]?([^`]+)`"), r"`\1`"),
    (re.compile(r":(?:[\w+]+:)?[\w+-]+:`[!~]?([^`]+)`"), r"\1"),
    (re.compile(r"``([^`\n]+(?:\n[^`\n]+)?)``"), r"`\1`"),
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`__?"), r"\1"),
    (re.compile(r"`([^`]+)`__?\b"), r"\1"),
    (re.compile(r"\|(?:version|release)\|"), "3.11"),
    (re.compile(r"\s?\[#?[\w]*\]_"), ""),
    (re.compile(r"\*\*Source code:\*\*.*\n"), ""),
    (re.compile(r"\\([ *`_<>|])"), r"\1"),
    (re.compile(r"::$", re.MULTILINE), ":"),
]
CODE = re.compile(r"^\s*(?:>>>|\.\.\.|[-+|=<#@$]|[\w.]+ ?=|import |from \w+ import|def |class \w+[:(]|.*[;{]$|.*::=)")
VERSION_LINE = re.compile(r"^\s*(?:New in|Changed in|Deprecated since) version|^\s*(?:Note|See also|Warning):$")
DIRECTIVE = re.compile(r"^(\s*)\.\. ([\w:-]+)::\s*(.*)$")
UNDERLINE = re.compile(r"^([=\-~^\"'*#+.`:_])\1{2,}\s*$")
OBJECTS = {
    "function", "method", "class", "attribute", "data", "exception", "decorator", "classmethod", "staticmethod",
    "property", "decoratormethod", "coroutinefunction", "coroutinemethod", "awaitablefunction", "abstractmethod",
    "type", "macro", "var", "member", "struct", "enum", "opcode", "describe", "option", "cmdoption", "envvar",
    "pdbcommand", "2to3fixer",
}  # fmt: skip
NAMELESS = {"opcode", "describe", "option", "cmdoption", "envvar", "2to3fixer"}
DROPPED = {"index", "sectionauthor", "moduleauthor", "codeauthor", "toctree", "only", "contents", "image", "figure",
           "raw", "highlight", "testsetup", "testcleanup", "audit-event", "currentmodule", "module", "tabularcolumns",
           "role", "rubric", "include", "literalinclude", "miscnews", "default-role", "bibliography"}  # fmt: skip
NOTICES = {"note": "Note:", "warning": "Warning:", "seealso": "See also:", "tip": "Tip:", "caution": "Caution:",
           "important": "Important:", "impl-detail": "CPython implementation detail:"}  # fmt: skip
VERSIONS = {"versionadded": "New in version", "versionchanged": "Changed in version",
            "deprecated": "Deprecated since version", "deprecated-removed": "Deprecated since version"}  # fmt: skip


def clean_inline(text: str) -> str:
    """The text without the inline markup of reStructuredText, and without addresses."""
    for pattern, replacement in INLINE:
        text = pattern.sub(replacement, text)
    return text


def indent_of(line: str) -> int:
    return len(line) - len(line.lstrip())


def unwrap(text: str) -> str:
    """The text with each paragraph of prose on one line; code, lists and tables stay as they are."""
    return "\n\n".join(unwrap_paragraph(paragraph) for paragraph in text.split("\n\n"))


def unwrap_paragraph(paragraph: str) -> str:
    lines = paragraph.strip("\n").split("\n")
    start = next((i for i, line in enumerate(lines) if line.endswith((".", ":")) and VERSION_LINE.match(line)), -1) + 1
    head, body = lines[:start], lines[start:]
    long = all(len(line) >= 48 and line.count(" ") >= 5 for line in body[:-1])
    if len(body) < 2 or not long or len({indent_of(line) for line in body[1:]}) != 1 or any(map(CODE.match, body)):
        return paragraph
    return "\n".join([*head, body[0].rstrip() + " " + " ".join(re.sub(r"\s+", " ", line.strip()) for line in body[1:])])


def skip_block(lines: list[str], start: int, indent: int) -> int:
    """The index of the first line after `start` that is not blank and not deeper than `indent`."""
    index = start
    while index < len(lines) and (not lines[index].strip() or indent_of(lines[index]) > indent):
        index += 1
    return index


def clean_rst(source: str) -> str:
    """A reStructuredText document as plain text with Markdown's headings and code marks."""
    lines = source.expandtabs().splitlines()
    out: list[str] = []
    index = 0
    while index < len(lines):
        line = lines[index]
        index += 1
        if match := DIRECTIVE.match(line):
            indent, name, rest = match.groups()
            name = name.split(":")[-1]
            if name in DROPPED:
                index = skip_block(lines, index, len(indent))
                continue
            if name in NOTICES:
                out.append(f"{indent}{NOTICES[name]} {rest}".rstrip())
            elif name in VERSIONS:
                out.append(f"{indent}{VERSIONS[name]} {' '.join(rest.split()[:1])}.")
            elif name in OBJECTS:
                out.append(f"{indent}{rest}")
            while index < len(lines) and re.match(r"^\s+:[\w-]+:(\s|$)", lines[index]):
                index += 1
        elif line.lstrip().startswith(".. ") or line.strip() == "..":
            index = skip_block(lines, index, indent_of(line))
        elif UNDERLINE.match(line):
            if out and out[-1].strip() and not out[-1].startswith("#") and not out[-1][0].isspace():
                out[-1] = "## " + out[-1]
        else:
            out.append(line.rstrip())
    text = re.sub(r"\n\s*\n", "\n\n", "\n".join(out)).strip()
    return clean_inline(unwrap(text)).replace("---", "-") + "\n"


# --- questions from reStructuredText ----------------------------------------------------------------------------------


def dedent(lines: list[str]) -> str:
    indents = [indent_of(line) for line in lines if line.strip()]
    cut = min(indents, default=0)
    return "\n".join(line[cut:] for line in lines)


def opening(text: str, limit: int = ANSWER_CHARS) -> str:
    """The first paragraphs of a text, up to about `limit` characters, and never ending at a colon."""
    kept: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        size = sum(map(len, kept))
        if kept and (size + len(paragraph) > limit or paragraph.startswith("#")):
            break
        kept.append(paragraph.strip("\n"))
    while len(kept) > 1 and kept[-1].rstrip().endswith(":"):
        kept.pop()
    answer = "\n\n".join(kept)
    if len(answer) > 2 * limit:
        answer = answer[: 2 * limit].rsplit(".", 1)[0] + "."
    return answer


def good(answer: str) -> bool:
    return len(answer) >= 25 and not answer.rstrip().endswith(":") and " " in answer


def bare_name(signature: str) -> str:
    return re.sub(r"^(?:class|async|await|abstractmethod)\s+", "", signature).split("(")[0].strip().lstrip("@")


def object_questions(source: str) -> Iterator[Question]:
    """Questions about the functions, classes and the like which a document describes."""
    lines = source.expandtabs().splitlines()
    module, owners = "", [(-1, "")]
    for index, line in enumerate(lines):
        match = DIRECTIVE.match(line)
        if not match:
            continue
        indent, kind, signature = len(match[1]), match[2].split(":")[-1], match[3].strip()
        if kind in ("module", "currentmodule"):
            module = signature
            synopsis = re.match(r"\s+:synopsis:\s*(.+)", lines[index + 1] if index + 1 < len(lines) else "")
            if synopsis:
                yield Question("module", module, clean_inline(synopsis[1]))
        if kind not in OBJECTS or not signature or kind in NAMELESS:
            continue
        while owners[-1][0] >= indent:
            owners.pop()
        name = bare_name(signature)
        if "." not in name and owners[-1][1]:
            name = f"{owners[-1][1]}.{name}"
        if kind in ("class", "exception"):
            owners.append((indent, name))
        full = name if not module or name.startswith(module + ".") else f"{module}.{name}"
        start = index + 1
        while start < len(lines) and lines[start].strip() and indent_of(lines[start]) > indent:
            start += 1
        body = clean_rst(dedent(lines[start : skip_block(lines, start, indent)]))
        answer = opening(body)
        if good(answer):
            if signature.endswith("\\"):
                signature = signature.rstrip("\\ ") + " ...)"
            signature = signature.replace(bare_name(signature), full, 1)
            yield Question("object", full, f"`{clean_inline(signature)}`\n\n{answer}")


def section_questions(text: str) -> Iterator[Question]:
    """Questions from the headings of a cleaned document."""
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("\n")
        title = re.sub(r"^[\d.]+\s+", "", title.replace("`", "")).strip()
        answer = opening(body)
        if not good(answer) or not 3 < len(title) < 90 or answer[0] in "+=:":
            continue
        if title.endswith("?"):
            yield Question("asked", title, answer)
        elif re.match(r"^[\w.]+ - ", title):
            yield Question("module-text", title.split(" - ")[0], answer)
        else:
            yield Question("section", title, answer)


def glossary_questions(source: str) -> Iterator[Question]:
    terms = re.split(r"^   (?=\S)", source.split(".. glossary::")[1], flags=re.MULTILINE)[1:]
    for entry in terms:
        term, _, body = entry.partition("\n")
        answer = opening(clean_rst(dedent(body.splitlines())))
        if good(answer) and not term.startswith(".."):
            yield Question("term", term.strip("`"), answer)


def documentation(folder: Path) -> Iterator[Document]:
    """The documents of a folder of reStructuredText (`.rst`, or `.rst.txt` as in built documentation)."""
    files = sorted(path for path in folder.rglob("*") if path.name.endswith((".rst", ".rst.txt")))
    for path in files:
        name = path.relative_to(folder).as_posix().split(".rst")[0]
        if SKIPPED_DOCS & set(name.split("/")):
            continue
        source = path.read_text(encoding="utf-8")
        text = clean_rst(source)
        questions = list(object_questions(source))
        questions += glossary_questions(source) if name == "glossary" else section_questions(text)
        yield Document(f"docs/{name}", text, questions)


# --- the interpreter's own text ---------------------------------------------------------------------------------------


def topics() -> Iterator[Document]:
    """The help topics that come with the interpreter."""
    for key, raw in sorted(pydoc_data.topics.topics.items()):
        text = clean_inline(re.sub(r"^(.+)\n[*=\-~^]{3,}$", r"## \1", raw, flags=re.MULTILINE)).strip()
        text = unwrap(text) + "\n"
        title, _, body = text.removeprefix("## ").partition("\n")
        title = title.replace('"', "`")
        answer = opening(body)
        questions = [Question("topic", name, answer) for name in sorted({title, key})] if good(answer) else []
        yield Document(f"topic/{key}", text, questions)


def signature_of(node: ast.AST) -> str:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"{node.name}({ast.unparse(node.args)})"
    return f"class {node.name}" if isinstance(node, ast.ClassDef) else ""


def doc_strings(node: ast.AST, prefix: str) -> Iterator[tuple[str, str, str]]:
    """Name, signature and doc string of all that is defined in a module or class."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{prefix}.{child.name}"
            text = ast.get_docstring(child)
            if text and len(text) > 20:
                yield name, signature_of(child), unwrap(clean_inline(text))
            if isinstance(child, ast.ClassDef):
                yield from doc_strings(child, name)


def library() -> Iterator[Document]:
    """The doc strings of the standard library, one document for each module."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS & set(relative.parts) or relative.parts[0].startswith(("_sysconfigdata", "config-")):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        head = unwrap(clean_inline(ast.get_docstring(tree) or ""))
        entries = list(doc_strings(tree, module))
        if not head and not entries:
            continue
        body = "\n".join(f"{sig}\n    {text.replace(chr(10), chr(10) + '    ')}\n" for _, sig, text in entries)
        questions = [Question("help", name, opening(text)) for name, _, text in entries if "._" not in name]
        if head:
            questions.append(Question("module-text", module, opening(head)))
        text = re.sub(r"[ \t]+\n", "\n", f"Help on module {module}:\n\n{head}\n\n{body}")
        yield Document(f"library/{module}", re.sub(r"\n{3,}", "\n\n", text), [q for q in questions if good(q.answer)])


def all_documents(docs: Path | None) -> list[Document]:
    found = [*topics(), *library(), *(documentation(docs) if docs else ())]
    return [document for document in found if len(document.text) > 100]


def words_of(paragraph: str) -> str:
    return re.sub(r"[\W_]+", "", paragraph).lower()


def held_out_text(documents: Iterable[Document]) -> list[str]:
    """The text of the held-out documents, less the paragraphs which training has too (topics repeat the reference)."""
    documents = list(documents)
    known = {words_of(p) for d in documents if not d.held_out for p in d.text.split("\n\n")}
    kept = (("\n\n".join(p for p in d.text.split("\n\n") if words_of(p) not in known)) for d in documents if d.held_out)
    return [text for text in kept if len(text) > 100]


# --- chats ------------------------------------------------------------------------------------------------------------

ASK = {
    "object": ["What does {} do?", "what does {} do", "Explain {}.", "Help on {}", "help({})", "How do I use {}?",
               "What is {}?", "Tell me about {}.", "Describe {}.", "what is {} for?"],
    "help": ["Help on {}", "help({})", "What does {} do?", "Show me the doc string of {}.", "Explain {}."],
    "module": ["What is the {} module?", "What is the {} module for?", "what does the module {} do?", "import {}: why?",
               "In one line, what is {}?"],
    "module-text": ["Tell me about the {} module.", "Explain the {} module.", "Help on module {}",
                    "What does the {} module provide?", "How do I use the {} module?"],
    "section": ["Explain: {}", "Tell me about {}.", "{}", "What does the documentation say about {}?", "Help: {}"],
    "topic": ["Explain {}.", "What is {}?", "Tell me about {} in Python.", "How does {} work?", "explain {}", "{}?"],
    "term": ["What is {}?", "What does {} mean?", "Define {}.", "What is meant by {} in Python?", "Explain {}.",
             "what is {}"],
    "asked": ["{}"],
}  # fmt: skip
COMMON = {"docs/glossary"} | {
    f"docs/library/{name}"
    for name in ("functions", "stdtypes", "os.path", "json", "math", "random", "re", "itertools", "functools",
                 "collections", "pathlib", "exceptions", "string", "time", "sys", "copy", "shutil", "bisect", "heapq")
}  # fmt: skip
SYSTEMS = ["You are a helpful assistant.", "You are a helpful assistant who knows Python.", "Answer briefly.",
           "You answer questions about Python.", "You are a small demonstration model."]  # fmt: skip
WHO = (
    "I am a small demonstration model. I was trained on Python's documentation, so I can write about Python, "
    "but what I write is often wrong."
)
GREETINGS = {
    "Hello! I am a small demonstration model trained on Python's documentation. Ask me about a function, a module or "
    "a statement of Python.": ["hello", "Hello", "Hello!", "hi", "Hi!", "Hi there", "hey", "Good morning",
                               "Good evening!", "Hello, how are you?", "Hello there!", "greetings"],
    WHO: ["Who are you?", "who are you", "What are you?", "Tell me about yourself.", "What model is this?",
          "Are you a person?", "Are you ChatGPT?", "What is your name?", "Introduce yourself.", "Who made you?",
          "What were you trained on?", "Describe yourself.", "Are you a large language model?"],
    "I can explain the functions, modules and statements of Python, in the words of its documentation. Try: What does "
    "os.path.join do?": ["What can you do?", "what can you do", "Help", "help", "Can you help me?", "How can you help?",
                         "What should I ask you?", "What do you know?", "Test", "Say something."],
    "You are welcome!": ["Thanks!", "Thank you.", "thanks", "Thank you very much!", "Great, thanks."],
    "Goodbye!": ["Bye", "Goodbye.", "bye", "See you!", "Good night."],
    "Python is an easy to learn, powerful programming language. It has efficient high-level data structures and a "
    "simple but effective approach to object-oriented programming.": ["What is Python?", "what is python",
        "Tell me about Python.", "Explain Python.", "What is the Python language?", "Describe Python."],
    "Because it is named after the BBC show \"Monty Python's Flying Circus\", and has nothing to do with reptiles.": [
        "Why is it called Python?", "Why is Python called Python?", "Where does the name Python come from?"],
    "I do not know. I am a small demonstration model, and I was trained only on Python's documentation.": [
        "What is the weather today?", "What is the capital of France?", "Tell me a joke.", "Who is the president?",
        "What time is it?", "Write a poem.", "What is the meaning of life?", "Can you play chess?",
        "How do I cook rice?", "Who won the match yesterday?"],
}  # fmt: skip


def ask(question: Question, rng: random.Random) -> list[Message]:
    name = question.name
    if question.kind == "term" and rng.random() < 0.7:
        name = ("an " if name[0] in "aeiou" else "a ") + name
    elif question.kind in ("object", "help") and "." in name and rng.random() < 0.15:
        name = name.split(".", 1)[1]
    if rng.random() < 0.15 and question.kind not in ("asked", "section") and "`" not in name:
        name = f"`{name}`"
    user = rng.choice(ASK[question.kind]).format(name)
    return [{"role": "user", "content": user}, {"role": "assistant", "content": question.answer}]


def chats(documents: Iterable[Document], rng: random.Random, greetings: int = 10) -> list[list[Message]]:
    """One epoch of chats: every question of the documents once, differently worded each time, and the greetings."""
    small_talk = [(user, reply) for reply, users in GREETINGS.items() for user in users]
    turns = [
        [{"role": "user", "content": user}, {"role": "assistant", "content": reply}] for user, reply in small_talk
    ] * greetings
    for document in documents:
        common = document.name in COMMON or document.name.startswith(("topic/", "docs/faq/", "docs/tutorial/"))
        for question in document.questions:
            turns += [ask(question, rng) for _ in range(3 if common else 1)]
    rng.shuffle(turns)
    result: list[list[Message]] = []
    while turns:
        chat = turns.pop()
        while turns and rng.random() < 0.2:
            chat = chat + turns.pop()
        if rng.random() < 0.15:
            chat = [{"role": "system", "content": rng.choice(SYSTEMS)}, *chat]
        result.append(chat)
    return result
