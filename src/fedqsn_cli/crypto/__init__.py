"""Who made an artifact, and who may read it: keys, signatures and sealed folders.

keys.py         a party's key pair: P-256 to sign, X25519 to open what was sealed for it
dsse.py         signed JSON statements: the envelope
signature.py    model.sig: who made the files of a folder (OpenSSF model signing)
optional.py     signing and verifying, if a command is given a key
attestation.py  a signed verdict of an audit (in-toto)
stream.py       authenticated encryption of a stream in chunks (STREAM)
folder.py       a flat folder as one stream of bytes, and back
seal.py         `seal` and `unseal`
verify.py       `verify`
"""
