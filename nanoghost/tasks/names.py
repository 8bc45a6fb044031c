"""Names that several tasks share, so that "How many a in Paris?" stands beside "How many people live in Paris?"."""

PLACES = tuple(
    """Paris London Rome Berlin Madrid Vienna Athens Venice Naples Florence Milan Verona Padua Cairo Tokyo Delhi Oslo
    Dublin Lisbon Moscow Boston Chicago Denver Texas Egypt Spain France Italy Greece Norway Denmark Sweden Poland
    Turkey Cyprus Russia China Japan India Brazil Peru Chile Canada Mexico Kenya Ghana Morocco Ireland Scotland Wales
    England Germany Austria Hungary Portugal Prague Warsaw Geneva Zurich Bristol Oxford York Leeds Sydney Lima
    Toronto Ottawa Finland Iceland Cuba Iran Iraq Nepal Vietnam Korea""".split()  # noqa: SIM905 (a list of 75 lines)
)
FIRST_NAMES = tuple(
    """Anna Tom Maria Peter Lucy Henry Alice Robert Emma David Sara Jack Nora Paul Clara Simon Ruth Martin Julia George
    Laura Daniel Rosa Frank Helen Oscar Mary Philip Jane Andrew Kate Edward Sophie Walter Ella Hugo Mark Amy Leo Ben
    Ines Omar Lena Ravi Mina Carl Otto Ida Max Grace""".split()  # noqa: SIM905
)
SURNAMES = tuple(
    """Brindle Harrow Quill Marsh Tolland Fenwick Grayson Penrose Ashdown Whitlow Carver Dunmore Holt Larkin Medway
    Norbury Oakes Pickering Rushton Selwyn Thorne Underhill Varley Wexford Yardley Bramble Crowe Drake Elwood Foxley
    Garland Hobbs Ivory Jessop Kettle Lovell Mercer Nettle""".split()  # noqa: SIM905
)
