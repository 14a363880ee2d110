"""What the names of series, files and channels say about the contrast of an image."""

from __future__ import annotations

import enum
import re

from slicer.i18n import tr as _

__all__ = ["Contrast", "contrastOfChannel", "contrastOfName", "rejectedName", "wordsOf"]


class Contrast(enum.Enum):
    """Kinds of images. T1 is a T1 of which nothing is said about contrast agent; CONFLICT: the name says several."""

    T1 = "T1"
    T1_PLAIN = "T1 without contrast agent"
    T1_ENHANCED = "T1 with contrast agent"
    T2 = "T2"
    T2_STAR = "T2*"
    FLAIR = "FLAIR"
    STIR = "STIR"
    PD = "PD"
    DWI = "DWI"
    ADC = "ADC"
    MR = "MR"
    CT = "CT"
    PET = "PET"
    CONFLICT = "several"

    @property
    def base(self) -> Contrast:
        """T1 for all three kinds of T1, else itself."""
        return Contrast.T1 if self in (Contrast.T1_PLAIN, Contrast.T1_ENHANCED) else self

    def words(self) -> str:
        """As a person says it."""
        if self is Contrast.T1_PLAIN:
            return _("T1 without contrast agent")
        return _("T1 with contrast agent") if self is Contrast.T1_ENHANCED else self.value


_CAPITALS = r"(?:T[12]|FLAIR|STIR|PD|DWI|ADC|CT|PET|SWI)"

# Names are lower case, with every run of other characters turned into one space.
_START, _END = r"(?<![a-z0-9])", r"(?![a-z0-9])"

# "T2 registered to T1" is a T2: the target of a registration is no contrast of the image itself.
_TARGET = re.compile(
    rf"{_START}(?:(?:reg|registered|coreg|resampled|aligned|warped)? ?(?:to|onto|on|in|into|space)) "
    r"(?:t1|t2|flair|pd|mni|ct)[a-z0-9]*"
)

_AGENT = r"contraste?|contrasto|contr|kontrast\w*|gadolinium|gado|gad|gd|km|mdc|injection|injecte?d?|inj|enhanced|enh"
_ENHANCED = re.compile(
    rf"{_START}(?:{_AGENT}|ce|gadavist|gadovist|dotarem|post|postgad|postgd|postcontrast|postcon|wcontrast|"
    rf"withcontrast|pluscontrast){_END}"
)
_PLAIN = re.compile(
    rf"{_START}(?:pre|precontrast|precon|pregad|native|nativ|plain|unenhanced|nonenhanced|noncontrast|nocontrast|"
    rf"withoutcontrast|nativo|wo){_END}"
)
_T1_GLUED = re.compile(rf"{_START}t1w?(ce|gd|gad|gado|c|km|post|contrast|contrastenhanced|cn|n|nat|nativ|pre)(?![a-z])")

_T1 = re.compile(rf"{_START}t1(?![0-9])|{_START}(?:mprage|mp rage|ir ?f?spgr|bravo|fspgr|spgr|vibe|ispgr){_END}")
_T2 = re.compile(rf"{_START}t2(?![0-9])")
_T2_STAR = re.compile(rf"{_START}(?:t2 ?star|t2s|swi|swan|swip|medic|hemo|venobold){_END}|t2star")
_FLAIR = re.compile(rf"flair|dark ?fluid|{_START}da fl{_END}|{_START}t2f{_END}")
_STIR = re.compile(rf"{_START}(?:stir|tirm){_END}")
_PD = re.compile(rf"{_START}(?:pd|pdw|pdwi|dp)(?![a-z0-9])|proton ?dens")
_DWI = re.compile(
    rf"{_START}(?:dwi|dti|diff|diffusion|trace|tracew|isodwi|b ?(?:500|800|1000|1500|2000)){_END}|resolve"
)
_ADC = re.compile(rf"{_START}(?:adc|dadc|dadcmap|adcmap)(?![a-z])|apparent diff")
_CT = re.compile(rf"{_START}(?:ct|cct|ncct|cect|ldct|nect)(?![a-z0-9])|computed tomo")
_PET = re.compile(rf"{_START}(?:pet|fdg|suv)(?![a-z0-9])")

_REJECTED = (
    ("localizer", re.compile(rf"{_START}(?:loc|localizer|localiser|localizador|scout|survey|topogram|surview|"
                             rf"scanogram|3 ?plane?|3 ?pl|plan scan|aahead|aahscout|smartbrain)(?![a-z])")),
    ("calibration", re.compile(rf"{_START}(?:cal|calib|calibration|asset|shim|b0 ?map|field ?map)(?![a-z])")),
    ("projection", re.compile(rf"{_START}(?:mip|mips|minip|tof|mra|angio|pjn|collapsed)(?![a-z])")),
    ("derived", re.compile(
        rf"{_START}(?:r?cbv|r?cbf|mtt|ttp|tmax|ktrans|fa|colfa|eadc|exp adc|expadc|phase|pha|qsm|dt1|delta ?t1|"
        rf"inv ?[12]|sh?molli|molli|t1 ?rho|"
        rf"subtraction|subtracted|subtr|ratio|relcbv|relcbf|t1 ?map|t2 ?map|quant|synt?h)(?![a-z])|"
        rf"t1w? ?(?:div|by|over|minus) ?t2|(?<=[a-z0-9] )sub{_END}"  # "sub-01" of BIDS stands at the start
    )),
    ("functional", re.compile(
        rf"{_START}(?:perf|perfusion|dsc|dce|asl|pcasl|pasl|bold|fmri|rest|rsfmri|spectro|mrs|csi)(?![a-z])"
    )),
    ("labels", re.compile(rf"{_START}(?:seg|mask|label|labels|labelmap|segmentation|brainmask|atlas|dseg|aseg)"
                             rf"(?![a-z])")),
    ("report", re.compile(rf"{_START}(?:screenshot|screen save|screensave|report|phoenix|dose|protocol|"
                                     rf"key images?)(?![a-z])")),
)  # fmt: skip

# BIDS says T1w, BraTS 2023 t1n, t1c, t2w and t2f, nnU-Net whatever its dataset.json says.
_CHANNELS = {
    Contrast.T1: "t1 t1w t1wi t1weighted",
    Contrast.T1_PLAIN: "t1n t1native t1pre t1nativ t1plain",
    Contrast.T1_ENHANCED: "t1ce t1gd t1c t1cn t1post t1km t1contrast t1gad t1wce t1gado t1contrastenhanced t1wc t1wgd",
    Contrast.T2: "t2 t2w t2wi t2weighted",
    Contrast.T2_STAR: "t2star t2s swi",
    Contrast.FLAIR: "flair t2flair t2f fl flairw t2wflair",
    Contrast.STIR: "stir",
    Contrast.PD: "pd pdw protondensity",
    Contrast.DWI: "dwi b1000 dwib1000 diffusion",
    Contrast.ADC: "adc",
    Contrast.MR: "mr mri mrt image img volume input channel0 0 c0 0000",
    Contrast.CT: "ct cect ncct",
    Contrast.PET: "pet pt suv fdg",
}


def contrastOfChannel(name: str) -> Contrast | None:
    """What a model's channel wants; None for a name that is no contrast."""
    plain = _clean(name)
    glued = plain.replace(" ", "")
    for contrast, spellings in _CHANNELS.items():
        if glued in spellings.split():
            return contrast
    found = contrastOfName(name)
    return None if found is Contrast.CONFLICT else found


def contrastOfName(text: str) -> Contrast | None:
    """What a name says of an image's contrast; None if nothing, CONFLICT if it says several."""
    text = _TARGET.sub(" ", _clean(text))
    t1 = bool(_T1.search(text))
    if _FLAIR.search(text) and not t1:
        return Contrast.FLAIR
    # "T1 FLAIR" is a T1: the inversion only sharpens it.
    star, t2 = bool(_T2_STAR.search(text)), bool(_T2.search(text))
    kinds = {
        Contrast.T1: t1,
        Contrast.T2_STAR: star,
        Contrast.STIR: bool(_STIR.search(text)),
        Contrast.PD: bool(_PD.search(text)),
        Contrast.ADC: bool(_ADC.search(text)),
        Contrast.CT: bool(_CT.search(text)),
        Contrast.PET: bool(_PET.search(text)),
    }
    kinds[Contrast.T2] = t2 and not star and not kinds[Contrast.STIR]
    # A diffusion-weighted image is T2 weighted as well, and an ADC map is made of it.
    kinds[Contrast.DWI] = bool(_DWI.search(text)) and not kinds[Contrast.ADC]
    if kinds[Contrast.DWI] or kinds[Contrast.ADC]:
        kinds[Contrast.T2] = False
    said = [contrast for contrast, yes in kinds.items() if yes]
    if len(said) != 1:
        return Contrast.CONFLICT if said else None
    return _enhancement(text) if said[0] is Contrast.T1 else said[0]


def rejectedName(text: str) -> str:
    """What kind of series this is that no model takes ("a localizer"...); "" if it may be an input."""
    text = _clean(text)
    kind = next((kind for kind, pattern in _REJECTED if pattern.search(text)), "")
    words = {
        "localizer": _("a localizer"),
        "calibration": _("a calibration scan"),
        "projection": _("a projection or angiogram"),
        "derived": _("a derived map"),
        "functional": _("a perfusion or functional series"),
        "labels": _("a label map"),
        "report": _("a picture or report"),
    }
    return words.get(kind, "")


def wordsOf(text: str) -> set[str]:
    """The words of a name, in lower case."""
    return set(_clean(text).split())


def _enhancement(text: str) -> Contrast:
    glued = _T1_GLUED.search(text)
    plain = bool(_PLAIN.search(text)) or bool(glued and glued[1] in ("n", "nat", "nativ", "pre"))
    enhanced = bool(_ENHANCED.search(text)) or bool(glued and glued[1] not in ("n", "nat", "nativ", "pre"))
    if (plain and enhanced) or re.search(rf"{_START}t1w? c{_END}", text):  # "T1 C": after, before or neither
        return Contrast.CONFLICT
    return Contrast.T1_PLAIN if plain else Contrast.T1_ENHANCED if enhanced else Contrast.T1


def _clean(text: str) -> str:
    """Lower case; signs for contrast agent as words; all else that is no letter or digit as one space."""
    # "MRBrainT1", "CTBrain": capitals are a word of their own; in "dT1" they are not.
    text = re.sub(rf"(?<=[a-z][a-z])(?={_CAPITALS}(?![a-z]))", " ", text)
    text = re.sub(rf"\b({_CAPITALS})(?=[A-Z][a-z])", r"\1 ", text)
    text = text.casefold()
    text = re.sub(r"t2\s*\*", "t2star", text)
    before = r"\b(?:non|no|without|ohne|sans|sin|senza|vor|pre|before|w\s*/\s*o)[\s_\-/.]*(?:iv[\s_\-]*)?"
    text = re.sub(rf"{before}(?:{_AGENT}|c)(?![a-z])", " precontrast ", text)
    text = re.sub(r"\bw\s*/\s*o\b", " precontrast ", text)
    text = re.sub(r"(?:\+\s*(?:c|gd|gad|km)|\bc\s*\+|\bw\s*/\s*(?:c|gd|gad|contrast)?)(?![a-z])", " contrast ", text)
    text = re.sub(r"[^a-z0-9]+", " ", text)
    # "T1pre", "FLAIRreg", "t1post2": words that are written together with what they describe.
    text = re.sub(r"\b(t[12]w?i?|flair)(pre|post|reg|registered|coreg|tra|sag|cor|ax|axial|tse|fse|se|fs|mprage)\b",
                  r"\1 \2", text)  # fmt: skip
    return text.strip()
