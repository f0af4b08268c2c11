"""What language models add to an answer although no passage says it: a grammar with slots for the case's own words.

Advice, caution, purposes, benefits, extra steps and closing summaries, each in hundreds of wordings, so that none of
them is learned by heart.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ragate.tuning.text import content_words, has

_THING = re.compile(
    r"\b(?:the|a|an|your|their|its|these|of|with|for) ([a-z]{3,}(?: [a-z]{4,})?)"
    r"(?= (?:is|are|was|were|of|in|for|and|to|with|on|at|from|can|will|may|that|which)\b|[.,;])"
)
_SLOT = re.compile(r"\{(\w+)\}")
_ASKING = re.compile(
    r"^(?:how (?:do|can|could|should|would) (?:i|you|we|one)|how to|what (?:can|should) (?:i|you) do to|can (?:i|you)) "
    r"([a-z].{4,50}?)[?.]?$",
    re.IGNORECASE,
)


def _options(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


GRAMMAR: dict[str, list[str]] = {
    "advice": _options(
        """
        It is {vital} to {do} {before}.
        It's {vital} to {do}, {because}.
        It is {often} {vital} to {do}.
        {note} it is {vital} to {do}.
        {sure} {do} {before}.
        {sure} {do}, {because}.
        {sure} {do} so that {good}.
        You may {also} want to {do} {before}.
        You should {also} {do} {before}.
        If you are unsure, {do} {before}.
        If you have {any} concerns about {topic}, {do}.
        Before you {begin}, {do}.
        For best results, {do} and {do}.
        When in doubt, {do}.
        Always {do} {before}.
        Experts {generally} recommend that you {do} {before}.
        It is {generally} recommended to {do} {before}.
        Be careful not to {harm}, {because}.
        Be sure not to {harm} when {working}.
        Avoid {harming}, as this can {bad}.
        Never {harm}, since it {can} {bad}.
        Remember to {do} {before}.
        Taking the time to {do} {can} {benefit}.
        """
    ),
    "caution": _options(
        """
        {note} {details} {can} vary depending on {factors}.
        {note} {details} {can} differ from {unit} to {unit}.
        {details} {can} vary {widely} depending on {factors}.
        The exact {figure} will depend on {factors}.
        {note} more research is needed to fully understand {topic}.
        {note} {topic} is not suitable for everyone.
        {note} not all {things} are the same.
        {note} this is only a general guideline, and {details} {can} change {sometime}.
        {note} the information above may not be complete or up to date.
        {note} {harming} {can} {bad}.
        {note} there is no guarantee that {good}.
        Results {can} vary depending on {factors}.
        However, {details} {can} also be affected by {factors}.
        As with anything, {topic} {comes} with both benefits and drawbacks.
        Ultimately, the best {choice} depends on {factors}.
        The {choice} between them {often} comes down to {factors}.
        {note} {details} may have changed since then, so it is best to {do}.
        """
    ),
    "merit": _options(
        """
        This {helps} {benefit}.
        This {helps} {benefit} and {benefit}.
        This {helps} ensure that {good}.
        This step is {vital} because it {helps} {benefit}.
        Doing so {can} {benefit}.
        This is done to {benefit}.
        This makes {topic} {ideal} for {whom}.
        This makes it {ideal} for {whom} who want to {benefit}.
        The {thing} {helps} {benefit}.
        The {thing} plays {role} role in {topic}.
        {topic} is {popular} among {whom} because it {helps} {benefit}.
        It is {popular} among {whom}.
        As a result, {good}.
        In addition, the {thing} {can} {benefit}.
        Additionally, {cap} {topic} {can} {benefit}.
        Many {whom} find that {topic} {helps} {benefit}.
        With its {quality} and {quality}, {topic} is {ideal} for {whom}.
        By paying attention to {thing}, you can {benefit}.
        These {things} {can} {benefit}.
        """
    ),
    "step": _options(
        """
        {then} {act} the {thing} {until}.
        {then} {act} the {thing} and {act} the {other} {until}.
        {act} the {thing} {until}, then {act} it again if {needed}.
        Repeat {this} for {each} {thing} {until}.
        Repeat {this} until {good}.
        Once {done}, {act} the {thing} and {do}.
        After {done}, check {that} {good}.
        Allow {period} for the {thing} to {settle}.
        {then} wait {period} before you {act} the {thing}.
        Gather {all} necessary {supplies}, including the {thing} and {supply}.
        Use {supply} to {act} the {thing} {until}.
        Label the {thing} with {mark}.
        Write down {mark} so that you can find the {thing} later.
        Test the {thing} {until}.
        If {trouble}, {act} the {thing} and try again.
        If {trouble}, {do}.
        Finally, {act} the {thing} and {do}.
        Double-check the {thing} {before}.
        Dispose of the {thing} properly {before}.
        """
    ),
    "fact": _options(
        """
        {topic} has been {used} for {ages}.
        {topic} {used2} dates back to {epoch}.
        The {thing} typically takes {period}.
        The {thing} is usually {made} and {made}.
        The average cost of {topic} is around {price}.
        Some popular examples include {example}, {example} and {example}.
        There are several types of {thing}, including {kind}, {kind} and {kind}.
        Other factors include {factor}, {factor} and {factor}.
        Compared to the {other}, the {thing} is {more} {adjective}.
        While the {thing} is {adjective}, the {other} is {more} {adjective}.
        Most {whom} {begin} to see results within {period}.
        The {thing} is located {where}.
        Common causes include {cause}, {cause} and {cause}.
        Possible side effects include {effect}, {effect} and {effect}.
        You can {also} find {more} information on {site}.
        You will {also} need to provide {paper} and {paper}.
        You can contact {office} for {more} details on {topic}.
        Failure to do so {can} {bad}.
        """
    ),
    "closing": _options(
        """
        {sum} {topic} is {vital} for {whom}, and {good}.
        {sum} {topic} requires {quality}, {quality} and {quality}.
        {sum} by following these {simple} steps, you can {goal} {easily}.
        {sum} the key differences between them lie in their {factor}, {factor} and {factor}.
        {sum} {topic} {can} {benefit} if it is {made}.
        {sum} the {thing} and the {other} both play {role} role in {topic}.
        {sum} {topic} is a {adjective} subject that depends on {factors}.
        {sum} understanding {topic} {can} {benefit}.
        {sum} {whom} should {do} {before}.
        {sum} with the right {thing}, you can {goal} {easily}.
        {sum} {topic} offers {whom} {quality} and {quality}.
        {sum} it is {vital} to {do} and {do}.
        """
    ),
    "addition": _options(
        """
        , which makes it {ideal} for {whom}
        , which {helps} {benefit}
        , which {can} {benefit}
        , making it {popular} among {whom}
        , making it {ideal} for {whom}
        , allowing {whom} to {benefit}
        , ensuring that {good}
        , helping to {benefit}
        , as this {helps} {benefit}
        , since it {can} {bad} otherwise
        , and {do} {before}
        , and it is {vital} to {do}
        , although {details} {can} vary depending on {factors}
        , depending on {factors}
        , which is {vital} for {whom}
        , and it usually takes {period}
        , and it costs around {price}
        , including {kind}, {kind} and {kind}
        , because {because2}
        , so that {good}
        , in order to {benefit}
        , and this is {often} {popular} among {whom}
        , resulting in {result}
        , especially for {whom}
        , unlike the {other}, which is {more} {adjective}
        , {until}
        , or until {good}
        , due to {cause} and {cause}
        , such as {example} and {example}
        """
    ),
    "vital": _options(
        "important\nessential\ncrucial\nvital\nadvisable\nhelpful\nnecessary\na good idea\nbest\nalways best\nwise"
    ),
    "note": _options(
        "It's important to note that\nIt is important to note that\nPlease note that\nKeep in mind that\n"
        "However, it's important to note that\nIt is also worth noting that\nNote that\nBear in mind that\n"
        "It should be noted that\nIt's worth mentioning that\nHowever, keep in mind that\nRemember that\nBe aware that"
    ),
    "sure": _options("Make sure to\nBe sure to\nTake care to\nDon't forget to\nAlways remember to\nTry to"),
    "do": _options(
        """
        consult a {expert}
        speak with a {expert}
        seek advice from a {expert}
        research and compare different {things}
        compare the prices of several {things}
        read the instructions {carefully}
        follow the manufacturer's instructions
        check the {thing} {carefully}
        check with {office}
        double-check the {thing}
        verify {details} with {office}
        keep the {thing} clean and dry
        keep a record of the {thing}
        read reviews of the {thing}
        test the {thing} first
        monitor the {thing} closely
        plan ahead and allow extra time
        consider your own needs and budget
        consider {factors}
        contact {office}
        wear gloves and protective clothing
        use the right {thing}
        use a high-quality {thing}
        store the {thing} in a cool, dry place
        maintain a healthy lifestyle
        eat a balanced diet and exercise regularly
        stay hydrated and get enough rest
        start slowly and adjust as {needed}
        learn more about {topic}
        take {factor} and {factor} into account
        """
    ),
    "expert": _options(
        "professional\nqualified professional\ndoctor\nhealthcare provider\nlicensed attorney\nfinancial advisor\n"
        "specialist\nlocal expert\ntax professional\npharmacist\nveterinarian\ncertified technician\nteacher"
    ),
    "office": _options(
        "the local authorities\nthe manufacturer\nyour provider\nthe official website\ncustomer service\nyour bank\n"
        "your employer\nthe relevant agency\nyour insurance company\nthe support team\na local office\nyour school"
    ),
    "site": _options(
        "the official website\nsocial media\nonline forums\nthe company's help page\nWikipedia\ngovernment websites\n"
        "review sites\nthe app store\nYouTube"
    ),
    "before": _options(
        "before making any decisions\nbefore you start\nbefore using the {thing}\nbefore moving on to the next step\n"
        "to avoid any problems\nto avoid mistakes\nfor the best results\nto be on the safe side\nat all times\n"
        "on a regular basis\nto find the best {choice} for your needs\nif {needed}\nthroughout the process\n"
        "beforehand\nto stay safe\nto {benefit}\nbefore deciding on {topic}\nas soon as possible"
    ),
    "because": _options(
        "as {harming} can {bad}\nas this can {benefit}\nas {details} can vary\nas every {unit} is different\n"
        "because it {helps} {benefit}\nas mistakes can be costly\nsince {topic} can be complex\nas it may {bad}\n"
        "especially if you are new to {topic}\nespecially when dealing with the {thing}"
    ),
    "because2": _options(
        "the {thing} {helps} {benefit}\nit {helps} {benefit}\nthe {thing} is {more} {adjective}\n"
        "{whom} want to {benefit}\nthere is a high demand for the {thing}\nthe {thing} is sensitive to {factor}"
    ),
    "details": _options(
        "the specific details\nthe exact steps\nthe specific requirements\nthe exact process\nthe specific benefits\n"
        "individual results\nthe rules\nthe cost\nprices\nthe time required\nthe availability\nthese guidelines\n"
        "the regulations on {topic}\nthe effects of {topic}\nthe details of {topic}\nthe specifics of the {thing}\n"
        "the options"
    ),
    "factors": _options(
        "{factor}\n{factor} and {factor}\n{factor}, {factor} and {factor}\nfactors such as {factor} and {factor}\n"
        "several factors, including {factor} and {factor}\nyour individual needs\nyour specific situation\n"
        "your personal preferences and needs\nthe individual and their {factor}\nthe type of {thing}\n"
        "the size and quality of the {thing}\nthe specific {thing} you are using\nindividual circumstances"
    ),
    "factor": _options(
        "location\nsize\nage\nquality\nhealth status\nbudget\nthe season\nthe weather\nexperience level\nlifestyle\n"
        "the provider\nbrand\nfunction\nstructure\ncost\ngenetics\nstress\nskill level\npersonal preference\n"
        "temperature\nduration\nlocal laws\ntiming\navailability\nthe {thing}\nfrequency\nconvenience"
    ),
    "unit": _options("person\nstate\ncompany\ncountry\nbrand\ncase\nregion\nsituation\nproduct\nindividual"),
    "benefit": _options(
        """
        prevent {trouble2}
        avoid {trouble2}
        improve your overall {factor}
        improve the {quality} of the {thing}
        save time and money
        make the {thing} easier to use
        make the process smoother
        protect the {thing} from damage
        keep the {thing} in good condition
        promote a healthy {unit2}
        reduce the risk of {trouble2}
        increase {quality}
        extend the life of the {thing}
        achieve the desired {result2}
        understand {topic} better
        maintain {quality} over time
        enhance the {quality} of {topic}
        support overall well-being
        get the most out of the {thing}
        make an informed decision
        create a {adjective} {thing}
        stay safe and comfortable
        reach their goals faster
        """
    ),
    "unit2": _options(
        "immune system\nenvironment\nwork-life balance\nrelationship\ncommunity\nskin\ndigestion"
    ),
    "quality": _options(
        "patience\nreliability\nefficiency\nflavor\ntexture\ndurability\nconvenience\nstability\naccuracy\nperformance\n"
        "careful planning\nattention to detail\nflexibility\nsecurity\ncomfort\nquality\nclarity\nconfidence"
    ),
    "trouble2": _options(
        "damage\ninjury\ninfection\ncomplications\nlegal issues\ndelays\nunnecessary costs\ncommon mistakes\nburning\n"
        "sticking\nerrors\nmisunderstandings\ncontamination\nchronic disease\noverheating\nfuture problems\nwaste"
    ),
    "result": _options(
        "a {adjective} {thing}\nbetter {quality} and {quality}\na smoother experience\nlower costs for {whom}\n"
        "{trouble2} in some cases\na more {adjective} {result2}\nhigher {quality}\nlong-term {trouble2}"
    ),
    "result2": _options("result\noutcome\nconsistency\neffect\nlook\nlevel of {quality}\nflavor"),
    "good": _options(
        """
        the {thing} is ready to use
        the {thing} is {made}
        the {thing} stays in good condition
        the {thing} works properly
        everything is in order
        you have enough {thing}
        all {things} are {made}
        your audience understands the {thing}
        {whom} can {benefit}
        it is safe to continue
        you get the best {result2}
        the {result2} is {adjective}
        nothing is damaged
        you are satisfied with the {result2}
        """
    ),
    "bad": _options(
        "lead to {trouble2}\ncause {trouble2}\nresult in {trouble2} and {trouble2}\naffect the {quality}\n"
        "damage the {thing}\nmake the {thing} less {adjective}\nhave serious consequences\nruin the {thing}\n"
        "increase the risk of {trouble2}\nmake the problem worse\nbe dangerous\nlead to penalties or fines"
    ),
    "harm": _options(
        "overcook the {thing}\nrush the process\nuse too much {thing}\ndamage the {thing}\nskip this step\n"
        "ignore the {thing}\ntouch the {thing} directly\nshare your personal information\nmix up the two\n"
        "leave the {thing} unattended\noverdo it\nforget the {thing}\nexpose the {thing} to sunlight"
    ),
    "harming": _options(
        "using too much {thing}\nrushing the process\nskipping this step\nignoring the {thing}\noverloading it\n"
        "leaving the {thing} unattended\nusing the wrong {thing}\ntouching the {thing} directly\npoor {factor}\n"
        "improper use of the {thing}\na lack of {quality}"
    ),
    "working": _options("handling the {thing}\ndealing with {topic}\nusing the {thing}\nchoosing a {thing}"),
    "helps": _options(
        "helps to\nhelps\ncan help to\ncan help\nwill help\nwill help you\nmay help to\nserves to"
    ),
    "can": _options("can\nmay\nmight\ncould\nwill often\ncan sometimes"),
    "often": _options("often\nusually\nalways\nsometimes\nalso\ngenerally\nparticularly\nalso very"),
    "generally": _options("generally\nusually\noften\ntypically\ncommonly\nstrongly"),
    "also": _options("also\nalways\nfirst\nthen"),
    "carefully": _options("carefully\nthoroughly\ntwice\nregularly\nclosely"),
    "cap": _options("this aspect of\nthe use of\na good understanding of\nregular attention to"),
    "any": _options("any\nserious\nany questions or\nspecific\nfurther"),
    "begin": _options("begin\nstart\nget started\nstart to plan\ncontinue"),
    "widely": _options("widely\ngreatly\nsignificantly\nslightly\nconsiderably"),
    "figure": _options(
        "cost\namount\ntime\nprice\nduration\nnumber\ntiming\noutcome\nprocedure\ntemperature"
    ),
    "sometime": _options(
        "over time\nat any time\nfrom year to year\nwithout notice\nin the future\neach season"
    ),
    "comes": _options("comes\ncan come\nusually comes\nis associated"),
    "choice": _options("choice\noption\napproach\nsolution\nmethod\nway forward\nproduct"),
    "ideal": _options(
        "ideal\na great choice\nperfect\na popular option\nwell suited\nsuitable\na good fit\nan excellent option"
    ),
    "popular": _options(
        "popular\nvery popular\na popular choice\nwidely used\nwell known\na favorite\nhighly valued"
    ),
    "whom": _options(
        "people\nbeginners\nfamilies\nstudents\nbusinesses\npatients\ntravelers\nbeginners and experts alike\nusers\n"
        "employers\nhomeowners\nvisitors\nmany individuals\nprofessionals\nparents\ncustomers\nyoung people"
    ),
    "role": _options("a crucial\nan important\na key\na vital\na central\na significant"),
    "then": _options("Then,\nNext,\nAfter that,\nOptionally,\nFirst,\nCarefully\nSlowly\nOnce ready,\nNow"),
    "act": _options(
        "check\nclean\nremove\nadjust\nrinse\nplace\nprepare\nsecure\nselect\nopen\ncover\nmeasure\nreplace\nstir\n"
        "inspect\nsave\nreview\nsubmit\ninstall\nwipe\nset aside\norganize\nturn\nheat\nlabel"
    ),
    "until": _options(
        "until it is {made}\nuntil you are satisfied with the {result2}\nfor {period}\nas {needed}\nif {needed}\n"
        "according to your preference\nfrom the list of options\nwith {supply}\nin {place}\nto make sure that {good}\n"
        "until {good}\nas desired\nonce more"
    ),
    "made": _options(
        "fully prepared\nclean and dry\nused correctly\nproperly installed\nfirmly in place\nthoroughly cooked\n"
        "evenly distributed\nwell maintained\nhandled with care\nsmooth and even\nproperly stored\ncompletely dry\n"
        "updated regularly\nclearly visible\nof high quality\nready"
    ),
    "needed": _options("needed\nnecessary\nrequired\ndesired\nappropriate"),
    "this": _options("this process\nthese steps\nsteps 2-4\nthe previous step\nthis procedure\nthe process"),
    "each": _options("each\nevery\nthe remaining\nany additional\nall of the\nthe other"),
    "done": _options(
        "the process is complete\nyou have finished\nyou are done\nthis is complete\nit is ready\nyou have done this"
    ),
    "that": _options("that\nwhether\nonce more that\nto see if"),
    "settle": _options("settle\ncool down\ndry\nset\ntake effect\nbe processed\nrest\nupdate"),
    "all": _options("all\nall the\nany\nthe"),
    "supplies": _options("materials\ndocuments\ningredients\nsupplies\ntools\nequipment\ninformation"),
    "supply": _options(
        "a clean cloth\na sharp knife\na ruler\na measuring cup\na screwdriver\nsoap and warm water\na notebook\n"
        "a soft brush\na calculator\na thermometer\na pair of tongs\nsome paper towels\na secure password"
    ),
    "mark": _options(
        "the date\nthe correct name\na short description\nthe appropriate scale\ndetails\nyour contact details"
    ),
    "trouble": _options(
        "the problem persists\nyou run into any issues\nthe {thing} does not work\nthe {thing} is damaged\n"
        "nothing happens\nyou notice anything unusual\nsymptoms persist\nyou are not sure\nan error appears"
    ),
    "place": _options(
        "a clean container\nthe settings menu\na safe place\nthe refrigerator\na separate bowl\nthe same folder"
    ),
    "period": _options(
        "a few minutes\n10 to 15 minutes\nseveral hours\ntwo weeks\nan hour\na few days\nthree to six months\n"
        "a couple of years\nat least 24 hours\n30 days\novernight"
    ),
    "price": _options("$50\n$100 to $200\n$1,500\n$25 per month\n$10 to $20\n$300 a year\n$75 an hour"),
    "used": _options("used\npopular\nstudied\npractised\nwell known\npart of everyday life"),
    "used2": _options("as we know it\nin its current form\noriginally\nprobably"),
    "ages": _options("centuries\nthousands of years\ndecades\na long time\nmany generations"),
    "epoch": _options(
        "ancient times\nthe 19th century\nthe early 1900s\nthe Middle Ages\nthe 1960s\nancient Rome"
    ),
    "example": _options(
        "Amazon\nGoogle\nWhatsApp\nNew York\nLondon\nCalifornia\nyoga\nMicrosoft\nchicken\nParis\nAustralia\nrice\n"
        "Facebook\nexercise\nvitamin C\nzinc\ntourism\nTexas\nfish\nagriculture"
    ),
    "kind": _options(
        "large ones\nelectronic ones\ntraditional ones\nnatural ones\nsynthetic ones\nportable ones\nseasonal ones\n"
        "public ones\ncommercial ones\norganic ones\nmodern ones\nlocal ones"
    ),
    "more": _options("more\nfar more\nmuch more\nless\nslightly more\ngenerally more\nfar less"),
    "adjective": _options(
        "flexible\ncomplex\neffective\nexpensive\nreliable\npopular\nconvenient\ndelicious\nefficient\ndurable\n"
        "stable\nmodern\nvaluable\nsensitive\nunique\naccessible\nsuccessful\nprofessional"
    ),
    "where": _options(
        "in the city center\non the front page\nin the lower back\nnear the main entrance\nat the bottom"
    ),
    "cause": _options(
        "stress\npoor diet\nold age\na lack of sleep\nhormonal changes\nbad weather\nhigh demand\npoor maintenance\n"
        "human error\ngenetics\ninfections\nrising costs\npollution\nmedication"
    ),
    "effect": _options(
        "headaches\nnausea\nfatigue\ndizziness\nfever\nswelling\ninsomnia\ndry mouth\nskin rashes\ncramps"
    ),
    "paper": _options(
        "proof of identity\nyour Social Security number\na recent photo\nbank statements\na birth certificate\n"
        "proof of address\na valid passport\na signed form\ntax returns\nyour date of birth"
    ),
    "simple": _options("simple\neasy\nbasic\nfew\nstraightforward"),
    "easily": _options(
        "easily\nsuccessfully\nwith confidence\nin no time\nsafely\nat home\nwithout any problems"
    ),
    "sum": _options(
        "Overall,\nIn summary,\nIn conclusion,\nTherefore,\nTo summarize,\nUltimately,\nIn short,\nSo,"
    ),
}
"""Symbol -> its expansions; besides there are {topic}, {goal}, {thing}, {other} and {things} of the case."""

KINDS = ("advice", "caution", "merit", "step", "fact", "closing")
"""Symbols that are whole sentences; `addition` goes behind one."""


@dataclass(frozen=True)
class Subject:
    """Words of a case that fill the slots."""

    topic: str
    goal: str
    things: tuple[str, ...]


def subject_of(question: str, passages: Sequence[str]) -> Subject:
    """What a question and its passages are about, as far as patterns see it."""
    text = " ".join(passages)
    things = [match[1] for match in _THING.finditer(text) if all(content_words(w) for w in match[1].split())]
    asked = _ASKING.match(question.strip())
    goal = asked[1] if asked else ""
    runs = [run for run in _runs(question) if has(text.lower(), run.lower())]
    topic = max(runs, key=lambda run: len(run.split()), default="")
    return Subject(
        topic or (things[0] if things else "this"), goal or "do this", tuple(things) or ("process",)
    )


def filler(
    kind: str, subject: Subject, rng: random.Random, grammar: Mapping[str, Sequence[str]] = GRAMMAR
) -> str:
    """A sentence of a kind of KINDS, or an `addition` to one, about the subject; or a symbol of another grammar."""
    text = _expand(kind, subject, rng, grammar)
    text = re.sub(r"\ba(?= [aeiou])", "an", text)
    return text if kind == "addition" else text[:1].upper() + text[1:]


def _expand(symbol: str, subject: Subject, rng: random.Random, grammar: Mapping[str, Sequence[str]]) -> str:
    if symbol in ("thing", "other"):
        return rng.choice(subject.things)
    if symbol == "things":
        thing = rng.choice(subject.things)
        return thing if thing.endswith("s") else f"{thing}s"
    if symbol in ("topic", "goal"):
        return subject.topic if symbol == "topic" else subject.goal
    return _SLOT.sub(lambda slot: _expand(slot[1], subject, rng, grammar), rng.choice(grammar[symbol]))


def _runs(question: str) -> list[str]:
    """Words in a row, at most three, that all carry meaning."""
    words = [word.strip("?.,!'()") for word in question.split()]
    found = []
    for start in range(len(words)):
        for end in range(start + 1, min(start + 3, len(words)) + 1):
            if all(len(word) > 2 and content_words(word) for word in words[start:end]):
                found.append(" ".join(words[start:end]))
    return found
