PRAGMA auto_vacuum = 2;
BEGIN TRANSACTION;
CREATE TABLE content (id INTEGER PRIMARY KEY, octets BLOB NOT NULL);
INSERT INTO "content" VALUES(1800000000000000,X'C3BC0D0A000D0A0D0A');
INSERT INTO "content" VALUES(1800000000000001,X'647565206C617465720D0A');
INSERT INTO "content" VALUES(1800000000000003,X'7368617265642062792074687265650D0A');
INSERT INTO "content" VALUES(1800000000000008,X'6D697865640D0A');
INSERT INTO "content" VALUES(1800000001500000,X'7265706F72740D0A');
INSERT INTO "content" VALUES(1800000001500001,X'646F7562740D0A');
INSERT INTO "content" VALUES(1800000001500002,X'657870697265640D0A');
INSERT INTO "content" VALUES(1800000902500000,X'68656C640D0A');
INSERT INTO "content" VALUES(1800000902500003,X'6163746976650D0A');
INSERT INTO "content" VALUES(1800000902500004,X'636C61696D65640D0A');
CREATE TABLE log (
    number INTEGER PRIMARY KEY,
    time REAL NOT NULL,
    id INTEGER NOT NULL,
    created REAL NOT NULL,
    upstream TEXT NOT NULL,
    route TEXT NOT NULL,
    sender TEXT NOT NULL,
    recipient TEXT NOT NULL,
    status TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    size INTEGER NOT NULL,
    reply TEXT NOT NULL,
    summary TEXT NOT NULL       -- JSON: to, cc, subject
);
INSERT INTO "log" VALUES(1,1800000000.0,1800000000000003,1800000000.0,'acme','acme-mail','app@acme.example','part0@x.example','sent',1,17,'250 2.0.0 Ok','');
INSERT INTO "log" VALUES(2,1800000001.5,1800000000000008,1800000000.0,'acme','acme-mail','app@acme.example','sent@x.example','sent',1,7,'250 2.0.0 Ok','["s","c","mixed"]');
INSERT INTO "log" VALUES(3,1800000001.5,1800000000000008,1800000000.0,'acme','acme-mail','app@acme.example','deferred@x.example','deferred',1,7,'450 4.2.0 later','["s","c","mixed"]');
INSERT INTO "log" VALUES(4,1800000001.5,1800000000000008,1800000000.0,'acme','acme-mail','app@acme.example','failed@x.example','failed',1,7,'550 5.1.1 nobody','["s","c","mixed"]');
INSERT INTO "log" VALUES(5,1800000001.5,1800000001500001,1800000000.0,'acme','acme-mail','app@acme.example','doubt@x.example','deferred',1,7,'gone','');
INSERT INTO "log" VALUES(6,1800000001.5,1800000001500001,1800000000.0,'acme','acme-mail','app@acme.example','plain@x.example','deferred',1,7,'450 4.2.0 later','');
INSERT INTO "log" VALUES(7,1800000902.5,1800000902500002,1800000000.0,'acme','acme-mail','','gone@x.example','failed',1,6,'550 5.1.1 nobody','');
CREATE TABLE message (
    id INTEGER PRIMARY KEY,
    content INTEGER NOT NULL,   -- id of the content, shared by the parts of a split message
    filed INTEGER NOT NULL,     -- 1: the content is a file
    shared INTEGER NOT NULL,    -- 1: other messages may have the same content
    upstream TEXT NOT NULL,
    route TEXT NOT NULL,
    due REAL NOT NULL,          -- seconds since the epoch
    attempts INTEGER NOT NULL,  -- begun so far
    token INTEGER,              -- of the claim, or NULL
    doubt INTEGER NOT NULL,     -- 1: a claim ended without a word: all recipients are in doubt
    held TEXT NOT NULL,         -- why nobody shall try it, or ''
    created REAL NOT NULL,
    sender TEXT NOT NULL,
    recipients TEXT NOT NULL,   -- those still to be served; see records.py
    facts TEXT NOT NULL,
    prefix BLOB NOT NULL,
    size INTEGER NOT NULL,
    reply TEXT NOT NULL         -- the last one, or ''
);
INSERT INTO "message" VALUES(1800000000000000,1800000000000000,0,0,'acme','acme-mail',0.0,0,NULL,0,'',1800000000.0,'müller@acme.example','[["grün@exämple.org","SUCCESS,FAILURE","utf-8;grün@exämple.org",0],["[odd]@example.org","","",0],["\"a b\"@x.example","NEVER","",0]]','{"listener":"local","client":"2001:db8::7","user":"erp","session":"S123","from":"billing@acme.example","to":"you, and others","cc":"c@example.org","subject":"Grüße","ret":"HDRS","envid":"x+2By","utf8":true,"8bit":true,"dots":true}',X'52656365697665643A2066726F6D20FF0D0A',9,'');
INSERT INTO "message" VALUES(1800000000000001,1800000000000001,0,0,'acme','acme-mail',1800003600.0,0,NULL,0,'',1800000000.0,'app@acme.example','later@x.example','{}',X'',11,'');
INSERT INTO "message" VALUES(1800000000000002,1800000000000002,1,0,'acme','acme-mail',0.0,0,NULL,0,'',1800000000.0,'app@acme.example','large@x.example','{}',X'',262145,'');
INSERT INTO "message" VALUES(1800000000000004,1800000000000003,0,1,'house','acme-mail',0.0,0,NULL,0,'',1800000000.0,'app@acme.example','part1@x.example','{}',X'',17,'');
INSERT INTO "message" VALUES(1800000000000005,1800000000000003,0,1,'acme','acme-mail',0.0,0,NULL,0,'',1800000000.0,'app@acme.example','part2@x.example','{}',X'',17,'');
INSERT INTO "message" VALUES(1800000000000006,1800000000000006,1,1,'acme','acme-mail',0.0,0,NULL,0,'',1800000000.0,'app@acme.example','filed0@x.example','{}',X'',262146,'');
INSERT INTO "message" VALUES(1800000000000007,1800000000000006,1,1,'house','acme-mail',0.0,0,NULL,0,'',1800000000.0,'app@acme.example','filed1@x.example','{}',X'',262146,'');
INSERT INTO "message" VALUES(1800000000000008,1800000000000008,0,0,'acme','acme-mail',1800000061.5,1,NULL,0,'',1800000000.0,'app@acme.example','deferred@x.example','{"to":"s","cc":"c","subject":"mixed"}',X'',7,'450 4.2.0 later');
INSERT INTO "message" VALUES(1800000001500000,1800000001500000,0,0,'house','acme-mail',1800000001.5,0,NULL,0,'',1800000000.0,'','app@acme.example','{}',X'',8,'');
INSERT INTO "message" VALUES(1800000001500001,1800000001500001,0,0,'house','acme-mail',1800000061.5,1,NULL,0,'',1800000000.0,'app@acme.example','[["doubt@x.example","","",1],["plain@x.example","","",0]]','{}',X'',7,'450 4.2.0 later');
INSERT INTO "message" VALUES(1800000001500002,1800000001500002,0,0,'acme','acme-mail',1800000060.0,1,NULL,1,'',1800000000.0,'app@acme.example','[["expired@x.example","","",0],["never@x.example","NEVER","",0]]','{}',X'',9,'');
INSERT INTO "message" VALUES(1800000902500000,1800000902500000,0,0,'acme','acme-mail',1800000902.5,0,NULL,0,'no route takes its sender any more',1800000000.0,'app@acme.example','held@x.example','{}',X'',6,'');
INSERT INTO "message" VALUES(1800000902500001,1800000902500001,0,0,'lost','lost',1800000962.5,1,NULL,0,'the content is missing from the spool',1800000000.0,'app@acme.example','lost@x.example','{}',X'',6,'');
INSERT INTO "message" VALUES(1800000902500003,1800000902500003,0,0,'acme','acme-mail',1800000060.0,1,8,0,'',1800000000.0,'app@acme.example','active@x.example','{}',X'',8,'');
INSERT INTO "message" VALUES(1800000902500004,1800000902500004,0,0,'globex','globex',1800000962.5,1,9,0,'',1800000000.0,'app@acme.example','claimed@x.example','{}',X'',9,'');
CREATE INDEX waiting ON message (upstream, route, attempts > 0, due) WHERE token IS NULL AND held = '';
CREATE INDEX sharing ON message (content) WHERE shared = 1;
CREATE INDEX log_id ON log (id);
COMMIT;
PRAGMA user_version = 1;
